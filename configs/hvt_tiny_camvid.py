# HVT-tiny + UPerNet on CamVid from random weights: 1 process x 8 images, 240 x 320 crops.
from mmengine.config import read_base

with read_base():
    from ._base_.camvid import *
    from ._base_.schedule_scratch import *
    from ._base_.upernet import *

from mmseg_volo import HVT

model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(type=HVT, arch='tiny', img_size=crop_size, drop_path_rate=0.05, recompute_activations=False),
    neck=dict(in_channels=[96, 96, 96, 96], out_channels=48),
    decode_head=dict(
        in_channels=[48, 48, 48, 48], channels=48, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        in_channels=48, channels=64, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
)
optim_wrapper.optimizer.update(lr=2e-3)
