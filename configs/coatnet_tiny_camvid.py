# CoAtNet-tiny + UPerNet on CamVid from random weights: 1 process x 8 images, 240 x 320 crops.
# The architecture and the recipe are ours: a CoAtNet of VOLO-tiny's size with VOLO-tiny's recipe.
from mmengine.config import read_base

with read_base():
    from ._base_.camvid import *
    from ._base_.schedule_scratch import *
    from ._base_.upernet import *

from mmseg_volo import CoAtNet

model.update(
    data_preprocessor=dict(size=crop_size, mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(type=CoAtNet, arch='tiny', img_size=crop_size, drop_path_rate=0.05),
    neck=None,
    decode_head=dict(
        in_channels=[24, 48, 96, 160], channels=48, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(
        in_channels=96, channels=64, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
)
optim_wrapper.optimizer.update(lr=2e-3)
