"""End-to-end demo: a data set, a trained model, its scores and pictures."""

import time
from pathlib import Path

from ..config import make_writable
from ..datasets.toy_streets import make_toy_streets
from .inference import infer
from .testing import test
from .training import train

TRAIN, VAL, SIZE, SHOWN = 400, 40, (256, 128), 8
WITHOUT_VALIDATION = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)  # the test measures the same scenes


def run_demo(
    out_dir: str = 'demo', seed: int = 0, verbose: bool = False, config: str = 'volo_tiny_toy_streets'
) -> dict:
    """Generate street scenes, train a model on them, measure it on unseen scenes and save its predictions as pictures.

    Args:
        out_dir: gets ``toy_streets/``, ``work_dir/``, ``report.html``, ``side_by_side/``, ``vis/`` and ``pred/``.
        seed: random seed for training; the scenes stay the same.
        verbose: print everything that goes into the log files.
        config: config to train.

    Returns:
        Mean scores in per cent, by name.
    """
    start = time.perf_counter()
    out = make_writable(out_dir)
    data = out / 'toy_streets'
    make_toy_streets(data, train=TRAIN, val=VAL, size=SIZE)
    common: dict = dict(work_dir=str(out / 'work_dir'), verbose=verbose)
    options = dict(data_root=str(data))
    runner = train(config, seed=seed, cfg_options={**options, **WITHOUT_VALIDATION}, **common)
    checkpoint = runner.message_hub.get_info('last_ckpt')
    metrics = test(
        config, checkpoint, out_dir=str(out), show_dir=str(out / 'side_by_side'), cfg_options=options, **common
    )
    scenes = sorted(str(path) for path in Path(data, 'leftImg8bit/val').rglob('*.png'))
    infer(config, checkpoint, scenes[:SHOWN], out_dir=str(out))
    print(
        f'mIoU {metrics["mIoU"]:.2f} on {VAL} unseen scenes after {(time.perf_counter() - start) / 60:.1f} minutes\n'
        f'  {out / "report.html"}: scores, best and worst scenes\n'
        f'  {out / "side_by_side"}: image, ground truth and prediction of each scene\n'
        f'  {out / "vis"}: overlays with a legend\n'
        f'  {checkpoint}: the model'
    )
    return metrics
