"""``.onnx`` files, written from a program of torch.export."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .._extras import require
from ..checkpoints.wording import first_sentence
from ..errors import UserError
from .description import INPUT, KEY, OUTPUT
from .program import no_shape_cache

OPSET = 18  # the lowest that torch writes


def check_possible(opset: int) -> None:
    """Raise ``UserError`` unless the packages are installed that write and check ONNX files, and know this opset."""
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        require(package, 'export', 'writing an ONNX file')
    latest = require('onnx.defs', 'export', 'writing an ONNX file').onnx_opset_version()
    if not OPSET <= opset <= latest:
        raise UserError(f'--opset must be from {OPSET}, the lowest that torch writes, to {latest}, got {opset}')


def write(program: ExportedProgram, path: Path, opset: int, text: str) -> None:
    """Write ``program`` and its description ``text``; above 2 GB the weights go into a second file, ``<path>.data``.

    Raises:
        UserError: torch cannot write this opset.
    """
    with _silence(), no_shape_cache():
        try:
            exported: Any = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f'torch cannot write this model as ONNX, opset {opset} ({first_sentence(error)})'
            ) from error
    actual = exported.model.opset_imports['']
    if actual != opset:
        raise UserError(f'--opset {opset} cannot be written: torch gives {actual}, and the lowest is {OPSET}')
    _forget_origin(exported.model)
    _name_axes(exported.model.graph)
    exported.model.metadata_props[KEY] = text
    exported.save(path)


@contextmanager
def _silence() -> Iterator[None]:
    """Context without the remarks of torch and onnxscript about constants and versions."""
    loggers = [logging.getLogger(name) for name in ('onnxscript', 'onnx_ir', 'torch.onnx')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _forget_origin(model: Any) -> None:
    """Remove what describes the Python source, a tenth of a small file, and torch's shapes of intermediate values.

    Runtimes infer shapes. ONNX Runtime takes torch's for facts, and some of CoAtNet's are wrong: it then stops.
    """
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = None


def _name_axes(graph: Any) -> None:
    """Call the open axes batch, height and width, where torch numbers them."""
    shape = [str(side) for side in graph.inputs[0].shape]
    names = {
        side: name
        for side, name in zip(shape, ('batch', 'channels', 'height', 'width'), strict=True)
        if not side.isdecimal()
    }
    for value in (*graph.inputs, *graph.outputs):
        for axis, side in enumerate(value.shape):
            if not isinstance(side, int):
                value.shape[axis] = names.get(str(side), str(side))
