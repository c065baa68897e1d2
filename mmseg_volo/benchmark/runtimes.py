"""Speed of whole segmentors on a CPU, in PyTorch and as exported files."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..export import onnx_file, rounding
from ..export.check import SIZES, TOLERANCES, difference, random_images
from ..export.program import Network, record
from ..export.runtime import Runtime
from .segmentor import build_segmentor
from .tables import time_row
from .timing import paired_times

CONFIGS = ('volo_tiny_camvid', 'volo_d1_ade20k')
SIDE = 512


class RuntimeBench:
    """PyTorch against ONNX Runtime and, if it is installed, OpenVINO, in three precisions.

    Args:
        quick: fewer rounds.
        configs: of segmentors, which get random weights.
        side: height and width of the image that is timed.
    """

    def __init__(self, quick: bool, configs: Sequence[str] = CONFIGS, side: int = SIDE):
        self.rounds, self.configs, self.side = (3 if quick else 10), configs, side
        self.contenders: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}

    def parity(self) -> list[dict]:
        """Export the models; a row per model and runtime in float32 with the largest difference."""
        onnx_file.check_possible(onnx_file.OPSET)
        rows = []
        for config in self.configs:
            network = Network(build_segmentor(config, 'cpu')[1]).eval()
            with TemporaryDirectory() as folder:
                found = _runtimes(network, Path(folder), self.side)
            rows += self.compared(config, network, [runtime for precision, runtime in found if precision == 'float32'])
            named = {f'{runtime} {precision}': runtime for precision, runtime in found}
            self.contenders[config] = {'ours': torch.inference_mode()(network), **named}
        return rows

    @staticmethod
    def compared(config: str, network: nn.Module, exported: Sequence[Runtime]) -> list[dict]:
        """A row per runtime with the largest difference of its logits from those of ``network``."""
        rows = []
        for runtime in exported:
            images = random_images([(batch, 3, height, width) for batch, height, width in SIZES])
            found = [difference(network, runtime, image, TOLERANCES['float32']) for image in images]
            error = max(one.largest / one.scale for one in found)
            met = not any(one.exceeds(TOLERANCES['float32']) for one in found)
            rows.append({'what': f'{config}: {runtime} against PyTorch', 'ours': f'{error:.1e}', 'met': met})
        return rows

    def speed(self) -> list[dict]:
        """A row per model: the time of PyTorch in float32, and the others' as multiples of it."""
        (image,) = random_images([(1, 3, self.side, self.side)])
        rows = []
        for config, contenders in self.contenders.items():
            runs = {name: _with(run, image) for name, run in contenders.items()}
            rows.append(time_row(f'{config}, {self.side} x {self.side}', paired_times(runs, self.rounds, 'cpu')))
        return rows


def _with(run: Callable[[Tensor], Tensor], image: Tensor) -> Callable[[], Tensor]:
    return lambda: run(image)


def _runtimes(network: nn.Module, folder: Path, side: int) -> list[tuple[str, Runtime]]:
    """Every runtime with a file in each precision."""
    files = {precision: folder / f'{precision}.onnx' for precision in TOLERANCES}
    onnx_file.write(record(network, None), files['float32'], onnx_file.OPSET, '{}')
    rounding.to_float16(files['float32'], files['float16'], '{}')
    rounding.to_int8(files['float32'], files['int8'], '{}', random_images([(1, 3, side, side)]))
    choices = [False, True] if find_spec('openvino') else [False]
    return [(precision, Runtime(str(file), choice)) for precision, file in files.items() for choice in choices]
