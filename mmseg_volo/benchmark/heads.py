"""Speed and memory of segmentors with our neck and head against the same backbone with mmseg's."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn
from tqdm import tqdm

from ..config import load_config, type_name
from .backbone import _parity_row as parity_row
from .memory import LiveMemory
from .segmentor import autocast, random_batch
from .timing import paired_times

# Config, height and width, rounds on a CPU. The batch is 2 in training and 1 in inference.
CELLS = {
    'tiny + UPerNet 240x320': ('volo_tiny_camvid', (240, 320), 5),
    'd1 + UPerNet 512': ('volo_d1_cityscapes', (512, 512), 2),
    'd1 + SegFormer 1024': ('volo_d1_segformer_cityscapes', (1024, 1024), 1),
    'd4 + UPerNet 512': ('volo_d4_cityscapes', (512, 512), 1),
    'd1 + UPerNet 1024': ('volo_d1_cityscapes', (1024, 1024), 1),
}
HEAD = 'd1 + UPerNet 1024'
PARITY = ['tiny + UPerNet 240x320', 'd1 + UPerNet 512', 'd1 + SegFormer 1024'], (96, 128)


def contenders(config: str, size: tuple[int, int], device: str) -> tuple[Config, dict[str, nn.Module]]:
    """The config and its segmentor with our neck and head and with mmseg's, with equal weights."""
    cfg = load_config(config, {'crop_size': size})
    cfg.model.backbone.img_size = size
    cfg.model.backbone.pop('init_cfg', None)
    cfg.model.data_preprocessor.size = size
    torch.manual_seed(0)
    ours = MODELS.build(cfg.model)
    settings = cfg.model.to_dict()
    for part in ('neck', 'decode_head'):
        settings[part]['type'] = type_name(cfg.model[part])  # mmseg's registry has its own class of that name
    theirs = MODELS.build(settings)
    theirs.load_state_dict(ours.state_dict())
    return cfg, {name: model.to(device) for name, model in dict(ours=ours, mmseg=theirs).items()}


def head_parity(device: str) -> list[dict]:
    """Errors of both segmentors against mmseg's in float64: scores and all gradients of a training step."""
    cells, size = PARITY
    rows = []
    for cell in cells:
        cfg, models = contenders(CELLS[cell][0], size, device)
        images, samples = random_batch(cfg, models['ours'], 2, device)
        exact = _results(contenders(CELLS[cell][0], size, device)[1]['mmseg'].double(), images.double(), samples)
        ours, mmseg = (_results(models[name], images, samples, device) for name in ('ours', 'mmseg'))
        gradients = [key for key in exact if key != 'scores']
        worst = max(gradients, key=lambda key: ((ours[key] - exact[key]).abs().max() / exact[key].abs().max()).item())
        rows += [parity_row(f'{cell}: {what}', ours[what], mmseg[what], exact[what]) for what in ('scores', worst)]
    return rows


def head_speed(device: str, rounds: Callable[[int], int]) -> list[tuple[str, dict[str, list[float]]]]:
    """Seconds of both contenders per round: whole segmentors, and the decode head alone."""
    measured = []
    for cell, (config, size, number) in tqdm(CELLS.items(), desc='segmentors', leave=False):
        cfg, models = contenders(config, size, device)
        images, samples = random_batch(cfg, models['ours'], 2, device)
        measured += _timed(cell, models, (images, samples), rounds(number), device)
        if cell == HEAD:
            with torch.no_grad():
                maps = [x.float() for x in models['ours'].extract_feat(images)]
            heads = {name: model.decode_head for name, model in models.items()}
            measured += _timed(f'decode head of {cell}', heads, (maps, samples), rounds(number), device)
    return measured


def head_memory(device: str) -> list[tuple[str, dict[str, int]]]:
    """Bytes of the activations that a training forward pass keeps, losses included."""
    measured = []
    for cell, (config, size, _) in CELLS.items():
        cfg, models = contenders(config, size, device)
        images, samples = random_batch(cfg, models['ours'], 2, device)
        kept = {}
        for name, model in models.items():
            with LiveMemory() as memory:
                losses = _loss(model.train(), images, samples, device)
                kept[name] = memory.live()
            del losses
        measured.append((f'activations {cell}', kept))
    return measured


def _timed(what: str, models: dict[str, nn.Module], batch: tuple, rounds: int, device: str) -> list:
    inputs, samples = batch
    first = inputs[:1] if isinstance(inputs, Tensor) else [x[:1] for x in inputs]
    leaves = inputs if isinstance(inputs, Tensor) else [x.requires_grad_() for x in inputs]

    def forward(model: nn.Module) -> None:
        with torch.no_grad(), autocast(device):
            model.eval()(first)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        _loss(model.train(), leaves, samples, device).backward()

    measured = []
    for name, run in (('forward', forward), ('train step', step)):
        runs = {key: partial(run, model) for key, model in models.items()}
        measured.append((f'{name} {what}', paired_times(runs, rounds, device)))
    return measured


def _loss(model: nn.Module, inputs, samples: list, device: str) -> Tensor:
    with autocast(device):
        if hasattr(model, 'decode_head'):
            losses = model(inputs, samples, mode='loss')
        else:
            losses = model.loss_by_feat(model(inputs), samples)
    return sum(value for key, value in losses.items() if 'loss' in key)


def _results(model: nn.Module, images: Tensor, samples: list, device: str = 'cpu') -> dict[str, Tensor]:
    """Scores, and the gradients of all parameters; both draw the same random numbers."""
    torch.manual_seed(0)
    with autocast(device):
        scores = model.train()(images)
    torch.linspace(-1, 1, scores.numel(), device=scores.device, dtype=scores.dtype).view(scores.shape).mul(
        scores
    ).sum().backward()
    gradients = {f'd {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {'scores': scores.detach(), **gradients}


def median_ratio(times: dict[str, list[float]]) -> float:
    """Median over the rounds of mmseg's time divided by ours."""
    return statistics.median(b / a for a, b in zip(times['ours'], times['mmseg'], strict=True))
