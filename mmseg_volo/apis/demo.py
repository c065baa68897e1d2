"""The whole way at once, one call."""

import time
from pathlib import Path

from ..config import make_writable
from ..datasets.toy_streets import make_toy_streets
from .inference import infer
from .testing import test
from .training import train

TRAIN, VAL, SIZE, SHOWN = 400, 40, (256, 128), 8


def run_demo(
    out_dir: str = 'demo', seed: int = 0, verbose: bool = False, config: str = 'volo_tiny_toy_streets'
) -> dict:
    """Make toy streets, train ``config`` on them, measure it on unseen scenes and draw what it sees.

    Args:
        out_dir: gets ``toy_streets/``, ``work_dir/``, ``metrics.json``, ``side_by_side/``, ``vis/`` and ``pred/``.

    Returns:
        The metrics.
    """
    start = time.perf_counter()
    out = make_writable(out_dir)
    data = out / 'toy_streets'
    make_toy_streets(data, train=TRAIN, val=VAL, size=SIZE)
    common = dict(work_dir=str(out / 'work_dir'), cfg_options=dict(data_root=str(data)), verbose=verbose)
    runner = train(config, seed=seed, **common)
    checkpoint = runner.message_hub.get_info('best_ckpt')
    metrics = test(config, checkpoint, out_dir=str(out), show_dir=str(out / 'side_by_side'), **common)
    scenes = sorted(str(path) for path in Path(data, 'leftImg8bit/val').rglob('*.png'))
    infer(config, checkpoint, scenes[:SHOWN], out_dir=str(out))
    print(
        f'mIoU {metrics["mIoU"]:.2f} on {VAL} unseen scenes after {(time.perf_counter() - start) / 60:.1f} minutes.\n'
        f'  {out / "side_by_side"}: image, truth and prediction of each\n'
        f'  {out / "vis"}: overlays with a legend\n'
        f'  {checkpoint}: the model'
    )
    return metrics
