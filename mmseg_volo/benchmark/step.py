"""Profile of a training step: backbone, neck, heads, losses, optimizer and data pipeline."""

import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from mmseg.registry import TRANSFORMS
from prettytable import PrettyTable
from torch import Tensor, nn

from .._device import resolve_device
from ..config import type_name
from ..errors import UserError
from .memory import LiveMemory
from .segmentor import autocast, build_segmentor, random_batch
from .timing import environment


def profile_step(
    config: str, device: str = 'auto', batch: int | None = None, images: int = 20, cfg_options: dict | None = None
) -> list[dict]:
    """Print time and activation memory for each part of a training step, and the data pipeline's images/s per worker.

    Weights and images are random. A GPU uses bfloat16 autocast, a CPU float32. Each part runs forward and backward
    separately, after a warm-up run.

    Args:
        batch: images per step (default: the config's).
        images: number of images for the data pipeline.

    Returns:
        Rows of the first table, one per part.

    Raises:
        UserError: the device is not available, a number is below 1, or the model has a cascade of heads.
    """
    for option, value in dict(batch=batch, images=images).items():
        if value is not None and value < 1:
            raise UserError(f'--{option} must be at least 1, got {value}')
    device = resolve_device(device)
    cfg, model = build_segmentor(config, device, cfg_options)
    batch = batch or cfg.train_dataloader.batch_size
    height, width = cfg.crop_size
    print('\n'.join(f'{key}: {value}' for key, value in environment(device).items()))

    parts = _Parts(device)
    x, samples = random_batch(cfg, model, batch, device)
    maps = parts.measure('backbone', model.backbone, x, model.backbone)
    if model.with_neck:
        maps = parts.measure('neck', model.neck, maps, model.neck)
    if isinstance(model.decode_head, nn.ModuleList):
        raise UserError(f'{config} has a cascade of decode heads, which profile-step cannot take apart')
    heads = {'decode head': model.decode_head}
    if model.with_auxiliary_head:
        several = isinstance(model.auxiliary_head, nn.ModuleList)
        auxiliary = model.auxiliary_head if several else [model.auxiliary_head]
        heads |= {f'auxiliary head {i}' if several else 'auxiliary head': head for i, head in enumerate(auxiliary)}
    for name, head in heads.items():
        logits = parts.measure(name, head, maps, head)

        def loss(logits: Tensor, head=head) -> Tensor:
            losses = head.loss_by_feat(logits, samples)
            return sum(value for key, value in losses.items() if 'loss' in key)

        parts.measure(f"{name}'s loss at full size", loss, logits, head)
    optimizer = torch.optim.AdamW(model.parameters(), fused=cfg.optim_wrapper.optimizer.get('fused'))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates its state
    parts.add('optimizer step (AdamW)', _timed(optimizer.step, device), 0.0, 0)

    total = sum(row['forward'] + row['backward'] for row in parts.rows)
    table = PrettyTable(['part', 'forward, s', 'backward, s', 'share', 'activations, MiB'], align='l')
    table.title = f'training step of {Path(config).stem}, {batch} x {height} x {width}'
    for row in parts.rows:
        share = (row['forward'] + row['backward']) / total
        table.add_row(
            [
                row['part'],
                f'{row["forward"]:.3g}',
                f'{row["backward"]:.3g}',
                f'{share:.0%}',
                f'{row["kept"] / 2**20:.0f}',
            ]
        )
    kept = sum(row['kept'] for row in parts.rows)
    table.add_row(['total', f'{total:.3g} (both)', '', '100%', f'{kept / 2**20:.0f}'])
    print(table, flush=True)
    _pipeline(cfg, images, batch / total)
    return parts.rows


class _Parts:
    def __init__(self, device: str):
        self.device, self.rows = device, []

    def measure(self, part: str, run, inputs, module: nn.Module):
        """Run forward and backward twice, record the second run, and return the detached outputs."""
        for _ in range(2):
            module.zero_grad(set_to_none=True)
            leaves = _detached(inputs)
            forward, outputs = _timed(lambda leaves=leaves: self._run(run, leaves), self.device, result=True)
            flat = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            scalar = sum(y.float().sum() for y in flat)
            backward = _timed(scalar.backward, self.device)
            del scalar, flat
        self.add(part, forward, backward, self._kept(run, inputs))
        return _detached(outputs)

    def add(self, part: str, forward: float, backward: float, kept: int) -> None:
        self.rows.append(dict(part=part, forward=forward, backward=backward, kept=kept))

    def _kept(self, run, inputs) -> int:
        leaves = _detached(inputs)
        if self.device == 'cuda':
            before = torch.cuda.memory_allocated()
            outputs = self._run(run, leaves)
            kept = torch.cuda.memory_allocated() - before
        else:
            with LiveMemory() as memory:
                outputs = self._run(run, leaves)
                kept = memory.live()
        del outputs
        return kept

    def _run(self, run, inputs):
        with autocast(self.device):
            return run(inputs)


def _timed(run, device: str, result: bool = False):
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = run()
    if device == 'cuda':
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return (seconds, value) if result else seconds


def _detached(tensors):
    if isinstance(tensors, Tensor):
        return tensors.detach().requires_grad_()
    return tuple(_detached(tensor) for tensor in tensors)


def _pipeline(cfg, images: int, images_per_second: float) -> None:
    """Print the time of each transform for an image of the data set's size, in one process."""
    scale = next(step['scale'] for step in cfg.train_pipeline if 'scale' in step)
    steps = [(type_name(step), TRANSFORMS.build(step)) for step in cfg.train_pipeline]
    seconds = dict.fromkeys([name for name, _ in steps], 0.0)
    with tempfile.TemporaryDirectory() as folder:
        image, labels = str(Path(folder, 'image.png')), str(Path(folder, 'labels.png'))
        generator = np.random.default_rng(0)
        # Smooth with noise, so that it decodes about as fast as a photograph.
        picture = cv2.resize(generator.integers(0, 256, (64, 128, 3), np.uint8), scale, interpolation=cv2.INTER_CUBIC)
        noise = generator.integers(0, 12, picture.shape, np.uint8)
        cv2.imwrite(image, cv2.add(picture, noise))
        classes = generator.integers(0, cfg.num_classes, (32, 64), np.uint8)
        cv2.imwrite(labels, cv2.resize(classes, scale, interpolation=cv2.INTER_NEAREST))
        for _ in range(images):
            results = dict(img_path=image, seg_map_path=labels, seg_fields=[], reduce_zero_label=False, label_map=None)
            for name, transform in steps:
                start = time.perf_counter()
                results = transform(results)
                seconds[name] += time.perf_counter() - start
    total = sum(seconds.values())
    table = PrettyTable(['transform', 'ms per image', 'share'], align='l')
    table.title = f'data pipeline, {scale[0]} x {scale[1]} PNG, one process'
    for name, spent in seconds.items():
        table.add_row([name, f'{spent / images * 1e3:.1f}', f'{spent / total:.0%}'])
    rate = images / total
    print(table)
    print(f'{rate:.1f} images/s per worker; the training step needs {images_per_second:.2f} images/s: ', end='')
    print(f'{max(1, -(-images_per_second // rate)):.0f} workers suffice')
