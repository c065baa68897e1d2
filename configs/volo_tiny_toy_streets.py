# VOLO-tiny + UPerNet on toy streets, the demo: 1 process x 4 images, 96 x 192 crops, 1200 iterations.
from mmengine.config import read_base

with read_base():
    from ._base_.schedule_scratch import *
    from ._base_.toy_streets import *
    from ._base_.upernet import *

from mmseg_volo import VOLO

model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(type=VOLO, arch='tiny', img_size=crop_size, recompute_activations=False),
    neck=dict(in_channels=[64, 128, 128, 128], out_channels=48),
    decode_head=dict(in_channels=[48, 48, 48, 48], channels=48, num_classes=num_classes),
    auxiliary_head=None,
)
max_iters = 1200
optim_wrapper.optimizer.update(lr=3e-3)
param_scheduler[1].update(end=max_iters)
train_cfg.update(max_iters=max_iters, val_interval=max_iters)
default_hooks.update(checkpoint=dict(interval=max_iters), logger=dict(interval=100))
