"""Running an exported file: from normalised images to logits, on a CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ..checkpoints.download import local_file
from ..checkpoints.wording import first_sentence
from ..errors import UserError
from . import program_file
from .description import KEY

SUFFIXES = ('.onnx', '.pt2')


def is_exported(path: str) -> bool:
    """Whether the name of a checkpoint is that of an exported file."""
    return str(path).lower().endswith(SUFFIXES)


class Runtime:
    """An exported file, ready to run.

    ``name`` and ``version`` say what runs it, ``text`` is its description as JSON, or None. Calling it maps normalised
    images ``[B, C, H, W]`` in float32 to logits, on any device; it computes on the CPU.

    Args:
        path: an ``.onnx`` or ``.pt2`` file, or the URL of one.
        openvino: run an ``.onnx`` file with OpenVINO instead of ONNX Runtime.
        amp: let OpenVINO compute in bfloat16 where the processor can.
        threads: number of threads; None means torch's.

    Raises:
        UserError: no such file, not a model, damaged, or the runtime is not installed.
    """

    def __init__(self, path: str, openvino: bool = False, amp: bool = False, threads: int | None = None):
        is_onnx = path.lower().endswith('.onnx')
        if openvino and not is_onnx:
            raise UserError(f'--openvino runs .onnx files, not {path}')
        if amp and not openvino:
            raise UserError(f'--amp does not go with {path}: an exported file has its precision; see export --fp16')
        file = local_file(path)
        if not file.is_file():
            raise UserError(f'exported model not found: {path}')
        open_file = _open_openvino if openvino else _open_onnx if is_onnx else _open_program
        threads = threads or torch.get_num_threads()
        self.path = path
        self.name, self.version, self.text, self._run = open_file(str(file), threads, amp)

    def __str__(self) -> str:
        return f'{self.name} {self.version}'

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes, H, W]``, or ``[B, classes]`` of a classifier, on the device of the images.

        Raises:
            UserError: the file does not take images of this size, or there is too little memory.
        """
        try:
            return self._run(images.float().cpu().contiguous()).to(images.device)
        except Exception as error:  # each runtime raises its own kinds
            size = ' x '.join(map(str, images.shape))
            reason = first_sentence(error)
            raise UserError(f'{self.name} cannot run {self.path} on images of {size} ({reason})') from error


Opened = tuple[str, str, str | None, Callable[[Tensor], Tensor]]


def _open_onnx(path: str, threads: int, amp: bool) -> Opened:
    onnxruntime = require('onnxruntime', 'export', f'running {path}')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # ONNX Runtime raises a dozen kinds for a damaged file
        raise _unusable(path, error) from None
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    (entry,) = session.get_inputs()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {entry.name: images.numpy()})[0])

    return 'ONNX Runtime', onnxruntime.__version__, text, run


def _open_openvino(path: str, threads: int, amp: bool) -> Opened:
    openvino = require('openvino', 'openvino', '--openvino')
    # By itself OpenVINO computes in bfloat16 where the processor has AMX, which changes labels.
    options = {'INFERENCE_PRECISION_HINT': 'bf16' if amp else 'f32', 'INFERENCE_NUM_THREADS': threads}
    try:
        model = _openvino_core().read_model(path)
        compiled = _openvino_core().compile_model(model, 'CPU', options)
    except Exception as error:
        raise _unusable(path, error) from None
    place = ['framework', KEY]
    text = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0])

    return 'OpenVINO', openvino.__version__.partition('-')[0], text, run


@cache
def _openvino_core() -> Any:
    """OpenVINO's core, one for all files: the next signal that Python handles could end a process that had two.

    Each core replaces the main thread's stack for signal handlers, and sets back the one before it when it ends, which
    is freed memory if that was the stack of a core that ended first.
    """
    return require('openvino', 'openvino', '--openvino').Core()


def _open_program(path: str, threads: int, amp: bool) -> Opened:
    network, text = program_file.load(path)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(images)

    return 'torch.export', torch.__version__.partition('+')[0], text, run


def _unusable(path: str, error: Exception) -> UserError:
    return UserError(f'{path} is not an ONNX model or is damaged ({first_sentence(error)})')
