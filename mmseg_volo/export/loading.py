"""Exported files in the place of checkpoints."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from torch import nn

from .._device import resolve_device
from ..config import first_test_set
from ..errors import UserError
from ..models.named_classifiers import NamedClassifier
from ..models.pretrained import load_segmentor
from ..models.segmentor import SlidingSegmentor
from .description import classes_of, normalisation, parsed
from .runtime import Runtime, is_exported


def device_for(checkpoint: str, device: str, compiled: bool = False, openvino: bool = False) -> str:
    """The device that runs ``checkpoint``, always the CPU for an exported file; ``device`` is as in ``resolve_device``.

    Raises:
        UserError: the device cannot be used, or an option does not go with this kind of file.
    """
    if not is_exported(checkpoint):
        if openvino:
            raise UserError(f'--openvino runs .onnx files, not {checkpoint}')
        return resolve_device(device)
    if compiled:
        raise UserError(f'--compile does not go with {checkpoint}: an exported file has no Python code to compile')
    if device not in ('auto', 'cpu'):
        raise UserError(f'--device {device} does not go with {checkpoint}: exported files run on the CPU')
    return 'cpu'


def load_weights(model: Any, checkpoint: str, cfg: Config, openvino: bool = False, amp: bool = False) -> Mapping:
    """Load a checkpoint, see ``load_segmentor``, or an exported file, see ``load_exported``, into a config's model."""
    if not is_exported(checkpoint):
        return load_segmentor(model, checkpoint)
    return load_exported(model, checkpoint, first_test_set(cfg), openvino, amp)


def load_exported(model: Any, path: str, dataset: Mapping, openvino: bool = False, amp: bool = False) -> dict[str, Any]:
    """Run a segmentor's network from the exported file ``path``.

    Returns ``dataset_meta``, as a checkpoint's ``meta`` has it, and the ``precision`` of the file.

    Windows, resizing and the choice of labels stay the segmentor's. Its backbone and neck are removed.

    Args:
        model: a ``SlidingSegmentor``.
        path: an ``.onnx`` or ``.pt2`` file.
        dataset: config of the data set, whose classes must be the file's.
        openvino: see ``Runtime``.
        amp: see ``Runtime``.

    Raises:
        UserError: the file is unusable, or contradicts the config.
    """
    if not isinstance(model, SlidingSegmentor):
        raise UserError(f'{path} needs a config with model.type SlidingSegmentor, this one has {type(model).__name__}')
    runtime = Runtime(path, openvino, amp)
    found = parsed(runtime.text, path, 'segmentation')
    logits = len(found['classes']) if found['threshold'] is None else 1
    wanted: dict[str, Any] = dict(number_of_logits=model.out_channels, **normalisation(model.data_preprocessor))
    if (meta := classes_of(dataset)) is not None:
        wanted['classes'] = list(meta['classes'])
    actual = found | {'number_of_logits': logits}
    for key, value in wanted.items():
        if actual[key] != value:
            name = key.replace('_', ' ')
            raise UserError(f'{path} was exported with {name} {actual[key]}, but the config has {value}')
    model.backbone = nn.Identity()
    for part in ('neck', 'auxiliary_head'):
        if hasattr(model, part):
            delattr(model, part)
    model.network = runtime
    dataset_meta = dict(classes=found['classes'], palette=found['palette'])
    return dict(dataset_meta=dataset_meta, precision=found.get('precision'))


def exported_classifier(
    path: str, name: str, openvino: bool = False, amp: bool = False
) -> tuple[Runtime, NamedClassifier]:
    """An exported classifier, and how pictures are prepared for it.

    Args:
        path: an ``.onnx`` or ``.pt2`` file.
        name: the classifier that it must be, such as ``'volo_d1_224'``, with or without the tag of the weights.
        openvino: see ``Runtime``.
        amp: see ``Runtime``.

    Raises:
        UserError: the file is unusable, or another classifier.
    """
    runtime = Runtime(path, openvino, amp)
    found = parsed(runtime.text, path, 'classification')
    if name not in (found['model'], found['weights']):
        raise UserError(f'{path} does not fit {name}, it is {found["weights"]}')
    return runtime, NamedClassifier(found['model'], found['weights'], found['transform'])
