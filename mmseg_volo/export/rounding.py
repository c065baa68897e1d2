"""Smaller and faster files: numbers of an ONNX file in float16 or in 8 bits."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .._extras import require
from .description import INPUT, KEY


def to_float16(source: Path, target: Path, text: str) -> None:
    """Write ``source`` with weights and activations in float16; input and output stay float32.

    Sizes and positions, from which bilinear weights follow, are integers and stay integers.

    Args:
        text: the description for ``target``.
    """
    onnx = require('onnx', 'export', '--fp16')
    float16: Any = require('onnxruntime.transformers.float16', 'export', '--fp16')
    model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
    _save(model, target, text)


def to_int8(source: Path, target: Path, text: str, images: Iterable[Tensor]) -> None:
    """Write ``source`` with 8-bit weights and inputs of convolutions and linear layers; everything else stays float32.

    Weights are rounded per output channel; the ranges of inputs are those that ``images`` give.

    Args:
        text: the description for ``target``.
        images: normalised, ``[1, 3, H, W]`` each.
    """
    onnx = require('onnx', 'export', '--int8')
    quantization: Any = require('onnxruntime.quantization', 'export', '--int8')
    shape_inference: Any = require('onnxruntime.quantization.shape_inference', 'export', '--int8')
    folded = target.with_name('folded.onnx')
    shape_inference.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
    model = onnx.load(folded)
    quantization.quantize_static(
        str(folded),
        str(target),
        _reader(quantization, images),
        nodes_to_quantize=_layers(model),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    folded.unlink()
    _save(onnx.load(target), target, text)


def _layers(model: Any) -> list[str]:
    """Names of the convolutions and matrix products with weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in ('Conv', 'MatMul') and node.input[1] in weights]


def _reader(quantization: Any, images: Iterable[Tensor]) -> Any:
    """``images`` as ONNX Runtime wants them."""
    batches: Iterator[dict] = ({INPUT: image.numpy()} for image in images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    return Reader()


def _save(model: Any, path: Path, text: str) -> None:
    onnx = require('onnx', 'export', 'writing an ONNX file')
    kept = [entry for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=KEY, value=text)
    onnx.save(model, path)
