import json
import sys

import pytest
from conftest import ROOT
from mmengine.config import Config
from PIL import Image

from mmseg_volo.apis.demo import run_demo

CONFIG = ROOT / 'configs/volo_tiny_toy_streets.py'


def test_demo_leaves_data_metrics_and_pictures_and_can_be_repeated(tmp_path, monkeypatch, capsys):
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, 'train_dataloader.batch_size': 2})
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.dump(tmp_path / 'short.py')
    module = sys.modules['mmseg_volo.apis.demo']
    for name, value in dict(TRAIN=4, VAL=3, SIZE=(96, 64), SHOWN=2).items():
        monkeypatch.setattr(module, name, value)
    for _ in range(2):
        metrics = run_demo(str(tmp_path / 'out'), config=str(tmp_path / 'short.py'))
    out = tmp_path / 'out'
    printed = capsys.readouterr().out
    assert 'already holds these toy streets' in printed and f'mIoU {metrics["mIoU"]:.2f} on 3 unseen scenes' in printed
    assert json.loads((out / 'metrics.json').read_text())['metrics']['mIoU'] == pytest.approx(metrics['mIoU'])
    assert len(list((out / 'side_by_side').iterdir())) == 3
    assert len(list((out / 'vis').iterdir())) == len(list((out / 'pred').iterdir())) == 2
    assert Image.open(next((out / 'side_by_side').iterdir())).width > 3 * 96
