"""Speed and memory of segmentors with our neck and heads against the same backbone with mmseg's."""

from functools import partial

import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn
from tqdm import tqdm

from ..config import load_config, type_name
from .memory import LiveMemory
from .segmentor import autocast, random_batch
from .tables import error, memory_row, parity_row, time_row
from .timing import paired_times

# Config, height and width, rounds on a CPU. Training takes 2 images, inference 1.
CELLS = {
    'tiny + UPerNet 240x320': ('volo_tiny_camvid', (240, 320), 15),
    'd1 + UPerNet 512': ('volo_d1_cityscapes', (512, 512), 2),
    'swin-t + UPerNet 512': ('swin_t_camvid', (512, 512), 2),
    'd1 + SegFormer 1024': ('volo_d1_segformer_cityscapes', (1024, 1024), 1),
    'd4 + UPerNet 512': ('volo_d4_cityscapes', (512, 512), 1),
    'd1 + UPerNet 1024': ('volo_d1_cityscapes', (1024, 1024), 1),
}
HEAD_ALONE = 'd1 + UPerNet 1024'
PARITY = ['tiny + UPerNet 240x320', 'd1 + UPerNet 512', 'd1 + SegFormer 1024'], (96, 128)
ROUNDS_ON_GPU = 7


class HeadBench:
    """Segmentors with our neck and head and with mmseg's, on one device."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick

    def parity(self) -> list[dict]:
        """Errors of both against mmseg's in float64: scores in training mode, and the worst of all gradients."""
        cells, size = PARITY
        rows = []
        for cell in cells:
            cfg, models = self.contenders(CELLS[cell][0], size)
            images, samples = random_batch(cfg, models['ours'], 2, self.device)
            found = {name: self._results(model, images) for name, model in models.items()}
            exact = self._results(self.contenders(CELLS[cell][0], size)[1]['mmseg'].double(), images.double())
            sizes = {key: value.abs().max() for key, value in exact.items() if key.startswith('d ')}
            # The exact gradient of a bias before a BatchNorm is zero, so it has no relative error.
            gradients = [key for key, size in sizes.items() if size > 1e-9 * max(sizes.values())]
            worst = max(gradients, key=lambda key: error(found['ours'][key], exact[key]))
            rows += [
                parity_row(f'{cell}: {what}', found['ours'][what], found['mmseg'][what], exact[what], 'mmseg')
                for what in ('scores', worst)
            ]
        return rows

    def speed(self) -> list[dict]:
        """Times of whole segmentors, and of one decode head alone."""
        rows = []
        for cell, (config, size, rounds) in tqdm(CELLS.items(), desc='segmentors', leave=False):
            cfg, models = self.contenders(config, size)
            images, samples = random_batch(cfg, models['ours'], 2, self.device)
            rows += self._times(cell, models, images, samples, self._rounds(rounds))
            if cell == HEAD_ALONE:
                with torch.no_grad(), autocast(self.device):
                    maps = models['ours'].eval().extract_feat(images)
                heads = {name: model.decode_head for name, model in models.items()}
                rows += self._times(f'decode head of {cell}', heads, maps, samples, self._rounds(rounds))
        return rows

    def memory(self) -> list[dict]:
        """Bytes that the forward pass of a train step keeps, losses included."""
        rows = []
        for cell, (config, size, _) in tqdm(CELLS.items(), desc='memory', leave=False):
            cfg, models = self.contenders(config, size)
            images, samples = random_batch(cfg, models['ours'], 2, self.device)
            kept = {}
            for name, model in models.items():
                with LiveMemory() as memory:
                    loss = self._loss(model.train(), images, samples)
                    kept[name] = memory.live()
                del loss
            rows.append(memory_row(f'activations {cell}', kept))
        return rows

    def contenders(self, config: str, size: tuple[int, int]) -> tuple[Config, dict[str, nn.Module]]:
        """The config, and its segmentor with our neck and head and with mmseg's; their weights are equal."""
        cfg = load_config(config, {'crop_size': size})
        cfg.model.data_preprocessor.size = size
        cfg.model.backbone.pop('init_cfg', None)
        if 'img_size' in cfg.model.backbone:
            cfg.model.backbone.img_size = size
        torch.manual_seed(0)
        ours = MODELS.build(cfg.model)
        settings = cfg.model.to_dict()
        for part in ('neck', 'decode_head', 'auxiliary_head'):
            if settings.get(part):
                settings[part]['type'] = type_name(cfg.model[part])  # mmseg's registry has its own class of that name
        theirs = MODELS.build(settings)
        theirs.load_state_dict(ours.state_dict())
        return cfg, {name: model.to(self.device) for name, model in dict(ours=ours, mmseg=theirs).items()}

    def _rounds(self, rounds: int) -> int:
        if self.device == 'cuda':
            return ROUNDS_ON_GPU
        return rounds if self.quick else 2 * rounds + 1

    def _times(self, what: str, models: dict[str, nn.Module], inputs, samples: list, rounds: int) -> list[dict]:
        one = inputs[:1] if isinstance(inputs, Tensor) else [x[:1] for x in inputs]
        leaves = inputs if isinstance(inputs, Tensor) else [x.detach().requires_grad_() for x in inputs]

        def forward(model: nn.Module) -> None:
            with torch.no_grad(), autocast(self.device):
                model.eval()(one)

        def step(model: nn.Module) -> None:
            model.zero_grad(set_to_none=True)
            self._loss(model.train(), leaves, samples).backward()

        rows = []
        for name, run in (('forward', forward), ('train step', step)):
            runs = {key: partial(run, model) for key, model in models.items()}
            rows.append(time_row(f'{name} {what}', paired_times(runs, rounds, self.device)))
        return rows

    def _loss(self, model: nn.Module, inputs, samples: list) -> Tensor:
        with autocast(self.device):
            if hasattr(model, 'decode_head'):
                losses = model(inputs, samples, mode='loss')
            else:
                losses = model.loss_by_feat(model(inputs), samples)
        return sum(value for key, value in losses.items() if 'loss' in key)

    def _results(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Scores and all gradients; every model draws the same random numbers."""
        torch.manual_seed(0)
        if images.dtype == torch.float64:
            scores = model.train()(images)
        else:
            with autocast(self.device):
                scores = model.train()(images)
        cotangent = torch.linspace(-1, 1, scores.numel(), device=scores.device, dtype=scores.dtype)
        scores.flatten().dot(cotangent).backward()
        gradients = {f'd {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {'scores': scores.detach(), **gradients}
