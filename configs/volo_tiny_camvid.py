# VOLO-tiny + UPerNet on CamVid from random weights: 1 process x 4 images, 240 x 320 crops.
from mmengine.config import read_base

with read_base():
    from ._base_.camvid import *
    from ._base_.schedule_scratch import *
    from ._base_.upernet import *

from mmseg_volo import VOLO

model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(type=VOLO, arch='tiny', img_size=crop_size, drop_path_rate=0.05, recompute_activations=False),
    neck=dict(in_channels=[64, 128, 128, 128], out_channels=48),
    decode_head=dict(
        in_channels=[48, 48, 48, 48], channels=48, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        in_channels=48, channels=64, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
)
max_iters = 8000
train_dataloader.update(batch_size=4)
optim_wrapper.optimizer.update(lr=1.4e-3)
param_scheduler[0].update(end=200)
param_scheduler[1].update(begin=200, end=max_iters)
train_cfg.update(max_iters=max_iters, val_interval=1000)
default_hooks.checkpoint.update(interval=1000)
