# CoAtNet-nano + UPerNet on CamVid from ImageNet weights: 1 process x 8 images, 240 x 320 crops. For a GPU.
# The recipe is ours.
from mmengine.config import read_base

with read_base():
    from ._base_.camvid import *
    from ._base_.schedule_scratch import *
    from ._base_.upernet import *

from mmseg_volo import CoAtNet

model.update(
    data_preprocessor=dict(size=crop_size, mean=[127.5] * 3, std=[127.5] * 3),  # as the weights were trained
    backbone=dict(
        type=CoAtNet,
        arch='nano_rw',
        img_size=crop_size,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://coatnet_nano_rw_224.sw_in1k'),
    ),
    neck=None,
    decode_head=dict(
        in_channels=[64, 128, 256, 512], num_classes=num_classes, loss_decode=dict(class_weight=class_weight)
    ),
    auxiliary_head=dict(in_channels=256, num_classes=num_classes, loss_decode=dict(class_weight=class_weight)),
)
max_iters = 4000
optim_wrapper.update(optimizer=dict(lr=1e-4))
param_scheduler[1].update(end=max_iters)
train_cfg.update(max_iters=max_iters)
