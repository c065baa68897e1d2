"""Speed and memory of our VOLO, timm's and the authors' form, with equal weights."""

import statistics
from collections.abc import Callable

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..models.volo import VOLO
from ..ops import outlook_attention
from ..ops.outlook.reference import outlook_attention_reference
from .memory import LiveMemory, peak_bytes
from .segmentor import autocast
from .tables import gradients_row, memory_row, parity_row, time_row
from .timing import paired_times

HEAD_WIDTH = 32
# Rounds per architecture and image side. The authors' D4 at 1024 takes a minute per pass on two cores.
FORWARD = {'d1@512': 5, 'd1@1024': 1, 'd4@512': 1, 'd4@1024': 1}
TRAIN = {'d1@512': 3, 'd1@1024': 1, 'd4@512': 1}
ROUNDS_ON_GPU = 7
IMAGES_ON_GPU = {'512': 8, '1024': 2}  # by side; fewer would leave it idle
# A training step of the authors' form at 1024 needs more memory than small machines have.
TOO_LARGE_FOR_A_CPU = {'train step d1@1024': ['authors']}
OPERATOR = {'d1@512': (64, 64, 6), 'd4@1024': (128, 128, 12)}  # H, W and heads N of a layer
ACTIVATIONS = ['d1@512', 'd4@512']
INFERENCE_PEAK = 'd1@1024'
PARITY = ['d1', 'd4'], (96, 128)
STAGE_TOLERANCE = 2e-6  # of float32; products on AMD processors round more, see ops/products.py


class BackboneBench:
    """Our VOLO, timm's and the authors' form on one device."""

    def __init__(self, device: str, quick: bool, compiled: bool):
        self.device, self.quick, self.compiled = device, quick, compiled
        self.dtype = torch.bfloat16 if device == 'cuda' else torch.float32
        self.dtype_name = 'bfloat16 autocast' if device == 'cuda' else 'float32'

    def find_floors(self) -> None:
        """Measure this device's peak rates: bytes/s of a large copy and multiply-adds/s of a large matrix product."""
        side = 8192 if self.device == 'cuda' else 2048
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        source = torch.empty(2**28, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        runs = {'copy': lambda: target.copy_(source), 'matmul': lambda: a @ b}
        seconds = {name: min(times) for name, times in paired_times(runs, 5, self.device).items()}
        self.bandwidth = 2 * source.nbytes / seconds['copy']
        self.matmul_rate = side**3 / seconds['matmul']
        print(f'floors: {self.bandwidth / 1e9:.0f} GB/s copied, {self.matmul_rate / 1e9:.0f} GMAC/s ({self.dtype})')

    def operator_floor(self, shape: tuple, backward: bool) -> float:
        """Seconds to read and write each tensor once: logits, value and output; in the backward pass also gradients."""
        B, H, W, N = shape
        value = B * H * W * N * HEAD_WIDTH
        logits = B * ((H + 1) // 2) * ((W + 1) // 2) * N * 81
        elements = 5 * value + 3 * logits if backward else 2 * value + logits
        return elements * self.dtype.itemsize / self.bandwidth

    def model_floor(self, cell: str, passes: int) -> float:
        """Seconds for the backbone's multiply-adds; a training step has three times those of a forward pass."""
        arch, side = cell.split('@')
        passes *= self.images(cell)
        with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
            VOLO(arch, img_size=int(side)).eval()(torch.empty(1, 3, int(side), int(side)))
        return passes * counter.get_total_flops() / 2 / self.matmul_rate

    def parity(self) -> list[dict]:
        """Errors of ours and timm in the measured precision against timm in float64: values and all gradients."""
        rows = []
        archs, size = PARITY
        for shape in ((2, 13, 20, 6), *self.operator_shapes().values()):
            exact, plain, ours = (
                _operator_results(function, shape, dtype, self.device)
                for function, dtype in (
                    (outlook_attention_reference, torch.float64),
                    (outlook_attention_reference, self.dtype),
                    (outlook_attention, self.dtype),
                )
            )
            for what in exact:
                rows.append(parity_row(f'operator {shape}: {what}', ours[what], plain[what], exact[what]))
        for arch in archs:
            models = self.models(arch, size)
            x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(self.device)
            exact = _model_results(self.models(arch, size)['timm'].double(), self, x.double())
            plain, ours = (_model_results(models[name], self, x) for name in ('timm', 'ours'))
            for what in [key for key in exact if key.startswith('stage')]:
                stage = (ours[what], plain[what], exact[what])
                rows.append(parity_row(f'{arch} {what}', *stage, float32=STAGE_TOLERANCE))
            rows.append(gradients_row(arch, ours, plain, exact))
        return rows

    def operator_shapes(self) -> dict[str, tuple]:
        return {cell: (self.images(cell), *shape) for cell, shape in OPERATOR.items()}

    def images(self, cell: str) -> int:
        return IMAGES_ON_GPU[cell.partition('@')[2]] if self.device == 'cuda' else 1

    def label(self, cell: str) -> str:
        images = self.images(cell)
        return cell if images == 1 else f'{cell}, {images} images'

    def operator(self) -> list[dict]:
        rows = []
        for cell, shape in self.operator_shapes().items():
            runs = {
                name: _operator_run(function, shape, self.dtype, self.device)
                for name, function in (('ours', outlook_attention), ('timm', outlook_attention_reference))
            }
            for what, position in (('forward', 0), ('forward + backward', 1)):
                times = paired_times({name: run[position] for name, run in runs.items()}, 15, self.device)
                times['authors'] = times['timm']  # the same form
                floor = self.operator_floor(shape, backward=position == 1)
                rows.append(time_row(f'operator {what} {self.label(cell)}', times, floor))
        return rows

    def forward(self) -> list[dict]:
        rows = []
        for cell, rounds in tqdm(FORWARD.items(), desc='forward', leave=False):
            models, x = self.cell(cell)
            runs = {name: (lambda model=model, x=x: self.run(model.eval(), x)) for name, model in models.items()}
            with torch.no_grad():
                times = paired_times(runs, self.rounds(rounds), self.device)
            rows.append(time_row(f'forward {self.label(cell)}', times, self.model_floor(cell, 1)))
        return rows

    def train_step(self) -> list[dict]:
        rows = []
        cells = dict(TRAIN, **{'d4@1024': ROUNDS_ON_GPU}) if self.device == 'cuda' else TRAIN
        for cell, rounds in tqdm(cells.items(), desc='train step', leave=False):
            models, x = self.cell(cell)
            if self.device == 'cpu':
                for name in TOO_LARGE_FOR_A_CPU.get(f'train step {cell}', []):
                    models.pop(name)

            def step(model, x=x):
                model.zero_grad(set_to_none=True)
                sum(y.float().square().mean() for y in self.run(model.train(), x)).backward()

            runs = {name: (lambda model=model, step=step: step(model)) for name, model in models.items()}
            times = paired_times(runs, self.rounds(rounds), self.device)
            rows.append(time_row(f'train step {self.label(cell)}', times, self.model_floor(cell, 3)))
        return rows

    def memory(self) -> list[dict]:
        """Memory of activations in training, and peak memory of inference."""
        rows = []
        for cell in ACTIVATIONS:
            models, x = self.cell(cell, others=False)
            kept = {name: self.kept_bytes(model, x) for name, model in models.items()}
            rows.append(memory_row(f'activations {self.label(cell)}', kept))
            models['ours'].with_cp = True
            checkpointed = {**kept, 'ours': self.kept_bytes(models['ours'], x)}
            rows.append(memory_row(f'activations {self.label(cell)}, with_cp', checkpointed))
        return [*rows, memory_row(f'inference peak {self.label(INFERENCE_PEAK)}', self.inference_peaks())]

    def inference_peaks(self) -> dict[str, int]:
        models, x = self.cell(INFERENCE_PEAK, others=False)
        peaks = {name: [] for name in models}
        with torch.no_grad():
            for _ in range(1 if self.quick else 3):
                for name, model in models.items():
                    peaks[name].append(peak_bytes(lambda model=model: self.run(model.eval(), x), self.device))
        return {name: statistics.median(sizes) for name, sizes in peaks.items()}

    def cell(self, cell: str, others: bool = True) -> tuple[dict[str, nn.Module], Tensor]:
        arch, side = cell.split('@')
        models = self.models(arch, (int(side), int(side)), others)
        return models, torch.randn(self.images(cell), 3, int(side), int(side), device=self.device)

    def models(self, arch: str, size: tuple[int, int], others: bool = False) -> dict[str, nn.Module]:
        """Contenders with equal weights, built for this size, as timm requires."""
        torch.manual_seed(0)
        with torch.device(self.device):
            ours = VOLO(arch, img_size=size)

        def theirs(fused: bool) -> nn.Module:
            settings = dict(type='TIMMBackbone', model_name=f'volo_{arch}_224', pretrained=False)
            with torch.device('meta'):  # the weights come from ours
                model = MODELS.build(dict(**settings, features_only=True, out_indices=(0, 1, 2, 3), img_size=size))
            for module in model.modules():
                if hasattr(module, 'fused_attn'):
                    module.fused_attn = fused
            inner = model.timm_model.model
            weights = ours.state_dict()
            # Before 1.0.30, timm keeps the classifier's token, which segmentation does not use.
            unused = {name: torch.zeros(p.shape) for name, p in inner.named_parameters() if name not in weights}
            inner.load_state_dict(weights | unused, strict=False, assign=True)
            return model

        models = dict(ours=ours, timm=theirs(fused=True), authors=theirs(fused=False))
        if others and not self.quick:
            models['timm channels_last'] = theirs(fused=True).to(memory_format=torch.channels_last)
        if others and self.compiled:
            models['timm compiled'] = torch.compile(theirs(fused=True))
        return {name: model.to(self.device) for name, model in models.items()}

    def run(self, model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        with autocast(self.device):
            return model(x)

    def kept_bytes(self, model: nn.Module, x: Tensor) -> int:
        """Bytes of the activations that a training forward pass keeps for the backward pass."""
        with LiveMemory() as memory:
            outputs = self.run(model.train(), x)
            kept = memory.live()
        del outputs
        return kept

    def rounds(self, rounds: int) -> int:
        if self.device == 'cuda':
            return ROUNDS_ON_GPU
        return rounds if self.quick else 2 * rounds + 1


def _operator_run(function: Callable, shape: tuple, dtype: torch.dtype, device: str) -> tuple[Callable, Callable]:
    """Two calls: forward without gradients, and forward + backward."""
    logits, value, cotangent, geometry = _operator_inputs(shape, dtype, device)

    def forward():
        with torch.no_grad():
            return function(logits, value, **geometry)

    def both():
        out = function(logits, value, **geometry)
        return torch.autograd.grad(out, (logits, value), cotangent)

    return forward, both


def _operator_inputs(shape: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, dict]:
    B, H, W, N = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

    logits, value = random(B, (H + 1) // 2, (W + 1) // 2, N, 9, 9), random(B, H, W, N * HEAD_WIDTH)
    cotangent = random(B, H, W, N * HEAD_WIDTH).detach()
    return logits, value, cotangent, dict(kernel_size=3, stride=2, scale=HEAD_WIDTH**-0.5)


def _operator_results(function: Callable, shape: tuple, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    logits, value, cotangent, geometry = _operator_inputs(shape, dtype, device)
    out = function(logits, value, **geometry)
    dlogits, dvalue = torch.autograd.grad(out, (logits, value), cotangent)
    return {'output': out.detach(), 'd logits': dlogits, 'd value': dvalue}


def _model_results(model: nn.Module, bench: BackboneBench, x: Tensor) -> dict[str, Tensor]:
    """Feature maps of the four stages, normalised as ours, and the gradients of all parameters that timm shares."""
    model.eval()
    outputs = model(x) if x.dtype == torch.float64 else bench.run(model, x)
    if not isinstance(model, VOLO):
        outputs = [nn.functional.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2) for y in outputs]
    cotangents = [torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape) for y in outputs]
    sum((y * g).sum() for y, g in zip(outputs, cotangents, strict=True)).backward()
    inner = model if isinstance(model, VOLO) else model.timm_model.model
    gradients = {f'd {name}': p.grad for name, p in inner.named_parameters() if p.grad is not None}
    return {**{f'stage {number}': y.detach() for number, y in enumerate(outputs)}, **gradients}
