"""Export: write a trained model as a file that runs without this package, and check that file before it appears."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmseg.apis import init_model
from torch import Tensor, nn
from torch.export import ExportedProgram

from .._files import whole_with_companions
from ..checkpoints.wording import first_sentence
from ..config import data_sets, load_config, output_path
from ..errors import UserError
from ..export import onnx_file, program_file
from ..export.check import SIZES, TOLERANCES, difference, random_images
from ..export.description import as_json, dataset_meta, describe_classifier, describe_segmentor
from ..export.program import Network, record
from ..export.runtime import Runtime
from ..models.named_classifiers import classifier_names, named_classifier
from ..models.pretrained import load_segmentor
from .classification import class_names

PRECISIONS = ('float32', 'float16', 'int8')


def export(
    config: str,
    checkpoint: str,
    out: str,
    opset: int | None = None,
    precision: str = 'float32',
    calibration_images: int = 64,
    seed: int = 0,
    cfg_options: dict | None = None,
) -> Path:
    """Write a segmentor or a classifier as ONNX or as a program of torch.export, and compare it with the checkpoint.

    Args:
        config: a config's path or name, or the name of a classifier, see ``named_classifier``.
        checkpoint: the model's weights.
        out: ``.onnx`` or ``.pt2`` file. It appears only if its logits are those of the checkpoint.
        opset: version of ONNX's operators, 18 by default.
        precision: a key of ``PRECISIONS``. ``'float16'`` halves the file; ``'int8'`` also rounds what convolutions and
            linear layers multiply, with ranges found on training images.
        calibration_images: number of training images for ``'int8'``.
        seed: chooses them.
        cfg_options: values that override the config, by dotted key.

    Returns:
        The file.

    Raises:
        UserError: config, checkpoint or output file is unusable, a package is missing, or the model cannot be exported.
    """
    path = output_path(out, '.onnx', '.pt2')
    is_onnx = path.suffix == '.onnx'
    if not is_onnx and (opset is not None or precision != 'float32'):
        raise UserError('--opset, --fp16 and --int8 are for .onnx files')
    if calibration_images < 1:
        raise UserError(f'--calibration-images must be at least 1, got {calibration_images}')
    if is_onnx:
        onnx_file.require_packages()
    said = _Steps()
    if not Path(config).is_file() and config.partition('.')[0] in classifier_names():
        model = _classifier(config, checkpoint, cfg_options)
    else:
        model = _segmentor(config, checkpoint, cfg_options)
    said(f'{model.description["model"]}: weights of {checkpoint} loaded')
    program = _recorded(model)
    said(f'network recorded for any batch {"" if model.size else "and any size"}')
    with whole_with_companions(path) as partial:
        text = as_json(model.description)
        if is_onnx:
            onnx_file.write(program, partial, opset or onnx_file.OPSET, text)
        else:
            program_file.save(program, partial, text)
        del program
        said(f'written as {f"ONNX, opset {opset or onnx_file.OPSET}" if is_onnx else "a program of torch.export"}')
        _check(model, partial, out, 'float32', random_images(model.shapes()))
        said('checked')
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')
    return path


@dataclass
class _Model:
    """A model that is about to be exported.

    ``size`` is the only size that it takes, or None; ``foreign`` names a layer that is neither ours nor mmseg's.
    """

    network: nn.Module
    description: dict[str, Any]
    size: tuple[int, int] | None = None
    foreign: str | None = None

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the images with which the file is checked."""
        if self.size:
            return [(batch, 3, *self.size) for batch in (1, 3)]
        return [(batch, 3, height, width) for batch, height, width in SIZES]


class _Steps:
    """Prints a line per step, with the seconds that it took."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, line: str) -> None:
        now = time.perf_counter()
        print(f'{line} ({now - self.start:.1f} s)', flush=True)
        self.start = now


def _segmentor(config: str, checkpoint: str, cfg_options: dict | None) -> _Model:
    cfg = load_config(config, cfg_options or {})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = init_model(cfg, checkpoint=None, device='cpu')
    meta = load_segmentor(model, checkpoint).get('dataset_meta')
    meta = meta or dataset_meta(data_sets(cfg.test_dataloader.dataset)[0])
    if meta is None:
        raise UserError(f'neither {checkpoint} nor the data set of {config} names the classes')
    description = describe_segmentor(cfg, model, meta, Path(config).stem)
    parts = [getattr(model, name) for name in ('backbone', 'neck', 'decode_head') if hasattr(model, name)]
    foreign = [type(part).__name__ for part in parts if not type(part).__module__.startswith('mmseg_volo.')]
    return _Model(Network(model), description, foreign=' and '.join(foreign) or None)


def _classifier(name: str, checkpoint: str, cfg_options: dict | None) -> _Model:
    if cfg_options:
        raise UserError(f'--cfg-options are for configs; {name} is a classifier')
    named = named_classifier(name, checkpoint)
    network = named.load(checkpoint)
    _, height, width = named.data['input_size']
    with torch.inference_mode():
        classes = network(torch.zeros(1, 3, height, width)).shape[1]
    names = [row['name'] for row in class_names(classes)]
    return _Model(network, describe_classifier(named, names), size=(height, width))


def _recorded(model: _Model) -> ExportedProgram:
    try:
        return record(model.network, model.size)
    except UserError:
        raise
    except Exception as error:  # torch.export raises many kinds
        if model.foreign is None:
            raise
        raise UserError(f'torch.export cannot record {model.foreign}: {first_sentence(error)}') from error


def _check(model: _Model, file: Path, out: str, precision: str, images: Sequence[Tensor]) -> None:
    """Print how the file differs from the checkpoint, and raise unless it is within the tolerance."""
    runtime, tolerance = Runtime(str(file)), TOLERANCES[precision]
    print(f'{runtime.name} {runtime.version} against PyTorch {torch.__version__.partition("+")[0]}:')
    for batch in images:
        found = difference(model.network, runtime, batch, tolerance, model.description.get('threshold'))
        print(f'  {found}', flush=True)
        if not found.exceeds(tolerance):
            continue
        problem = f'{out} was not written, because {runtime.name} gives other logits than the checkpoint ({found})'
        if model.foreign:
            raise UserError(f'{problem}; torch.export does not record {model.foreign} for every size')
        raise RuntimeError(problem)
