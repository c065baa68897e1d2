"""Speed and memory of segmentors with our neck and heads against the same backbone with mmseg's."""

from contextlib import nullcontext
from functools import partial

import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn
from tqdm import tqdm

from ..config import load_config, type_name
from .memory import LiveMemory
from .segmentor import autocast, random_batch
from .tables import gradients_row, memory_row, parity_row, time_row
from .timing import paired_times

# Config, height and width, rounds on a CPU. There, training takes 2 images and inference 1.
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
IMAGES_ON_GPU = 8  # fewer would leave it idle: training and inference


class HeadBench:
    """Segmentors with our neck and head and with mmseg's, on one device."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick

    def parity(self) -> list[dict]:
        """Errors of both against mmseg's in float64: scores in training mode, and the worst of all gradients.

        The gradients are float32 on a GPU, too: BatchNorm over two images' averages multiplies the rounding errors of
        bfloat16 until they are larger than some gradients.
        """
        cells, size = PARITY
        rows = []
        for cell in cells:
            cfg, models = self.contenders(CELLS[cell][0], size, dropout=False)
            images, _ = random_batch(cfg, models['ours'], 2, self.device)
            with torch.backends.cudnn.flags(allow_tf32=False):
                gradients = {name: self._gradients(model, images) for name, model in models.items()}
            scores = {name: self._scores(model, images).detach() for name, model in models.items()}
            exact = self.contenders(CELLS[cell][0], size, dropout=False)[1]['mmseg'].double()
            expected = self._gradients(exact, images.double())
            scores['exact'] = self._scores(exact, images.double()).detach()
            rows.append(parity_row(f'{cell}: scores', *scores.values(), 'mmseg'))
            rows.append(gradients_row(f'{cell}:', *gradients.values(), expected, 'mmseg'))
        return rows

    def speed(self) -> list[dict]:
        """Times of whole segmentors, and of one decode head alone."""
        rows = []
        for cell, (config, size, rounds) in tqdm(CELLS.items(), desc='segmentors', leave=False):
            cfg, models = self.contenders(config, size)
            images, samples = random_batch(cfg, models['ours'], self._images(), self.device)
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
            images, samples = random_batch(cfg, models['ours'], self._images(), self.device)
            kept = {}
            for name, model in models.items():
                with LiveMemory() as memory:
                    loss = self._loss(model.train(), images, samples)
                    kept[name] = memory.live()
                del loss
            rows.append(memory_row(f'activations {cell}', kept))
        return rows

    def contenders(
        self, config: str, size: tuple[int, int], dropout: bool = True
    ) -> tuple[Config, dict[str, nn.Module]]:
        """The config, and its segmentor with our neck and head and with mmseg's; their weights are equal.

        ``dropout=False`` is for comparing values: a GPU draws other numbers for other dtypes.
        """
        cfg = load_config(config, {'crop_size': size})
        cfg.model.data_preprocessor.size = size
        cfg.model.backbone.pop('init_cfg', None)
        if 'img_size' in cfg.model.backbone:
            cfg.model.backbone.img_size = size
        if not dropout:
            cfg.model.backbone.drop_path_rate = 0.0
            for head in (cfg.model.decode_head, cfg.model.get('auxiliary_head') or {}):
                head.update(dropout_ratio=0.0)
        torch.manual_seed(0)
        with torch.device(self.device):
            ours = MODELS.build(cfg.model)
        settings = cfg.model.to_dict()
        for part in ('neck', 'decode_head', 'auxiliary_head'):
            if settings.get(part):
                settings[part]['type'] = type_name(cfg.model[part])  # mmseg's registry has its own class of that name
        theirs = MODELS.build(settings)
        theirs.load_state_dict(ours.state_dict())
        return cfg, {name: model.to(self.device) for name, model in dict(ours=ours, mmseg=theirs).items()}

    def _images(self) -> int:
        return IMAGES_ON_GPU if self.device == 'cuda' else 2

    def _rounds(self, rounds: int) -> int:
        if self.device == 'cuda':
            return ROUNDS_ON_GPU
        return rounds if self.quick else 2 * rounds + 1

    def _times(self, what: str, models: dict[str, nn.Module], inputs, samples: list, rounds: int) -> list[dict]:
        images = IMAGES_ON_GPU if self.device == 'cuda' else 1
        some = inputs[:images] if isinstance(inputs, Tensor) else [x[:images] for x in inputs]
        leaves = inputs if isinstance(inputs, Tensor) else [x.detach().requires_grad_() for x in inputs]

        def forward(model: nn.Module) -> None:
            with torch.no_grad(), autocast(self.device):
                model.eval()(some)

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

    def _scores(self, model: nn.Module, images: Tensor) -> Tensor:
        """Scores in training mode in the measured precision, or in float64."""
        with nullcontext() if images.dtype == torch.float64 else autocast(self.device):
            return model.train()(images)

    def _gradients(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Gradients of all parameters in the precision of ``images``."""
        scores = model.train()(images)
        cotangent = torch.linspace(-1, 1, scores.numel(), device=scores.device, dtype=scores.dtype)
        scores.flatten().dot(cotangent).backward()
        return {f'd {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
