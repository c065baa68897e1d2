"""Export: write a trained model as a file that runs without this package, and check that file before it appears."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmseg.apis import init_model
from mmseg.registry import DATASETS
from torch import Tensor
from torch.export import ExportedProgram

from .._files import whole_with_companions
from ..checkpoints.download import local_file
from ..checkpoints.wording import first_sentence
from ..config import LABEL_LOADERS, data_sets, first_test_set, output_path, without_steps
from ..datasets.checks import check_data
from ..errors import UserError
from ..export import onnx_file, program_file, rounding
from ..export.check import SIZES, TOLERANCES, difference, random_images
from ..export.description import as_json, classes_of, describe_classifier, describe_segmentor
from ..export.loading import load_weights
from ..export.program import Network, record
from ..export.runtime import Runtime, is_exported
from ..models.named_classifiers import classifier_names, named_classifier
from .classification import class_names
from .sources import load_model, try_out

SHOWN = 4  # training images for which the labels of an int8 file are compared


def export(
    config: str,
    checkpoint: str | None,
    out: str,
    opset: int | None = None,
    precision: str = 'float32',
    calibration_images: int = 64,
    seed: int = 0,
    cfg_options: dict | None = None,
) -> Path:
    """Write a segmentor or a classifier as ONNX or as a program of torch.export, and compare it with the checkpoint.

    Args:
        config: a config's path or name; ``hf://owner/name``; a folder that ``mmseg-volo push`` wrote; or the name of a
            classifier, see ``named_classifier``.
        checkpoint: the model's weights; None takes those of ``config``, if it has any. For another precision, also an
            ``.onnx`` file that this function wrote for a segmentor, which saves the time to record it.
        out: ``.onnx`` or ``.pt2`` file, which appears whole or not at all.
        opset: version of ONNX's operators, 18 by default.
        precision: ``'float32'``; ``'float16'``, which halves the file; or ``'int8'``, which rounds the weights and the
            inputs of convolutions and linear layers, within ranges found on training images.
        calibration_images: number of training images for ``'int8'``.
        seed: chooses them.
        cfg_options: values that override the config, by dotted key.

    Returns:
        The file.

    Raises:
        UserError: config, checkpoint or output file is unusable, a package is missing, or the model cannot be exported.
        RuntimeError: the logits of the file are not those of the checkpoint.
    """
    path = output_path(out, '.onnx', '.pt2')
    is_onnx = path.suffix == '.onnx'
    if not is_onnx and (opset is not None or precision != 'float32'):
        raise UserError('--opset, --fp16 and --int8 are for .onnx files')
    if calibration_images < 1:
        raise UserError(f'--calibration-images must be at least 1, got {calibration_images}')
    reused = checkpoint if checkpoint is not None and is_exported(checkpoint) else None
    if reused and (precision == 'float32' or opset is not None or not reused.lower().endswith('.onnx')):
        raise UserError(f'{checkpoint} is exported already: only --fp16 and --int8 apply, and only to .onnx files')
    opset = onnx_file.OPSET if opset is None else opset
    if is_onnx:
        onnx_file.check_possible(opset)
    said = _Steps()
    if not Path(config).is_file() and config.partition('.')[0] in classifier_names():
        model = _classifier(config, checkpoint, precision, cfg_options)
    else:
        model = _segmentor(config, checkpoint, cfg_options, precision == 'int8')
        if precision == 'int8':
            check_data(model.cfg, ('train',))
    said(f'{checkpoint or config} loaded')
    with whole_with_companions(path) as file:
        if not reused:
            _write(model, file, out, opset, said)
        if precision != 'float32':
            source = local_file(reused) if reused else file
            pictures = islice(_training_images(model, seed), calibration_images) if precision == 'int8' else iter(())
            _round(model, source, file, out, precision, pictures, said)
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')
    if model.cfg is not None:
        print(f'to see what this costs: mmseg-volo test {config} {path} --compare METRICS_OF_THE_CHECKPOINT.json')
    return path


@dataclass
class _Model:
    """A model that is about to be exported.

    ``reference`` says what runs ``network``, ``cfg`` is a segmentor's config, ``size`` the only size of a classifier's
    pictures, ``foreign`` the names of layers that are not ours.
    """

    network: Any
    description: dict[str, Any]
    reference: str = f'PyTorch {torch.__version__.partition("+")[0]}'
    cfg: Config | None = None
    size: tuple[int, int] | None = None
    foreign: str | None = None

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the images with which the file is checked."""
        if self.size:
            return [(batch, 3, *self.size) for batch in (1, 3)]
        return [(batch, self.network.channels, height, width) for batch, height, width in SIZES]


class _Steps:
    """Prints a line per step, with the seconds that it took."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, line: str) -> None:
        now = time.perf_counter()
        print(f'{line} ({now - self.start:.1f} s)', flush=True)
        self.start = now


def _segmentor(config: str, checkpoint: str | None, cfg_options: dict | None, with_data: bool = False) -> _Model:
    found = load_model(config, checkpoint, cfg_options or {}, with_data)
    cfg = found.config
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # without a checkpoint mmseg guesses the classes; they are set below
        model = init_model(cfg, checkpoint=None, device='cpu')
    loaded = load_weights(model, found.checkpoint, cfg)
    if (precision := loaded.get('precision') or 'float32') != 'float32':
        raise UserError(f'{found.checkpoint} has numbers in {precision} already: give a float32 file or a checkpoint')
    if found.is_foreign:
        try_out(model, config)
    meta = loaded.get('dataset_meta') or classes_of(first_test_set(cfg))
    if meta is None:
        raise UserError(f'neither {found.checkpoint} nor the data set of {config} names the classes')
    description = describe_segmentor(cfg, model, meta, Path(config).stem)
    parts = [getattr(model, name) for name in ('backbone', 'neck', 'decode_head') if hasattr(model, name)]
    foreign = [type(part).__name__ for part in parts if not type(part).__module__.startswith('mmseg_volo.')]
    reference = str(model.network) if is_exported(found.checkpoint) else _Model.reference
    return _Model(Network(model), description, reference, cfg, foreign=' and '.join(foreign) or None)


def _classifier(name: str, checkpoint: str | None, precision: str, cfg_options: dict | None) -> _Model:
    if checkpoint is None:
        raise UserError(f'{name} has no weights of its own: give a checkpoint after it')
    if cfg_options:
        raise UserError(f'--cfg-options are for configs; {name} is a classifier')
    if precision == 'int8':
        raise UserError(f'--int8 needs the training images of a config; {name} is a classifier')
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


def _write(model: _Model, file: Path, out: str, opset: int, said: _Steps) -> None:
    """Write the model in float32, and compare the file with it."""
    program = _recorded(model)
    said(f'recorded for any batch{"" if model.size else ", height and width"}')
    if file.suffix == '.onnx':
        onnx_file.write(program, file, opset, as_json(model.description))
    else:
        program_file.save(program, file, as_json(model.description))
    del program
    said(f'written as {f"ONNX, opset {opset}" if file.suffix == ".onnx" else "a program of torch.export"}')
    _compare(model, file, out, random_images(model.shapes()), 'float32')
    said('compared')


def _round(
    model: _Model, source: Path, file: Path, out: str, precision: str, pictures: Iterator[Tensor], said: _Steps
) -> None:
    """Write the ONNX file ``source`` in another precision, and compare that with the model."""
    text = as_json(model.description | dict(precision=precision))
    if precision == 'float16':
        rounding.to_float16(source, file, text)
        said('converted to float16')
        images: Sequence[Tensor] = random_images(model.shapes())
    else:
        images = list(islice(pictures, SHOWN))
        rounding.to_int8(source, file, text, chain(images, pictures))
        said('rounded to 8 bits, with ranges from training images')
    _compare(model, file, out, images, precision)
    said('compared')


def _compare(model: _Model, file: Path, out: str, images: Sequence[Tensor], precision: str) -> None:
    """Print how the file differs from the checkpoint; raise if float32 or float16 explain less than that."""
    runtime, tolerance = Runtime(str(file)), TOLERANCES[precision]
    print(f'{runtime} against {model.reference}:')
    for batch in images:
        found = difference(model.network, runtime, batch, tolerance, model.description.get('threshold'))
        print(f'  {found}', flush=True)
        if not found.exceeds(tolerance):
            continue
        problem = f'{out} was not written, because {runtime.name} gives other logits than the checkpoint ({found})'
        if precision == 'float16':
            raise UserError(f'{problem}: the range or precision of float16 is too small for this model')
        if model.foreign:
            raise UserError(f'{problem}: torch.export does not record {model.foreign} for every size')
        raise RuntimeError(problem)


def _training_images(model: _Model, seed: int) -> Iterator[Tensor]:
    """Training images in random order, as the network gets them in inference: resized, a window of each, normalised."""
    assert model.cfg is not None
    segmentor: Any = model.network.segmentor
    steps = without_steps(first_test_set(model.cfg).pipeline, LABEL_LOADERS)
    sets = [
        DATASETS.build({**settings, 'pipeline': steps}) for settings in data_sets(model.cfg.train_dataloader.dataset)
    ]
    places = [(dataset, index) for dataset in sets for index in range(len(dataset))]
    random = np.random.default_rng(seed)
    for place in random.permutation(len(places)):
        dataset, index = places[place]
        image = dataset[index]['inputs']
        (height, width), windows = segmentor._places(*image.shape[-2:])
        top, left = windows[random.integers(len(windows))]
        yield segmentor.data_preprocessor(dict(inputs=[image[:, top : top + height, left : left + width]]))['inputs']
