# HVT-S1 + UPerNet on CamVid from random weights: 1 process x 8 images, 240 x 320 crops. For a GPU.
from mmengine.config import read_base

with read_base():
    from ._base_.camvid import *
    from ._base_.schedule_scratch import *
    from ._base_.upernet import *

from mmseg_volo import HVT

model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(type=HVT, arch='s1', img_size=crop_size, drop_path_rate=0.1),
    neck=dict(in_channels=[384, 384, 384, 384], out_channels=256),
    decode_head=dict(
        in_channels=[256, 256, 256, 256], num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(in_channels=256, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)),
)
max_iters = 8000
optim_wrapper.update(optimizer=dict(lr=3e-4))
param_scheduler[1].update(end=max_iters)
train_cfg.update(max_iters=max_iters)
