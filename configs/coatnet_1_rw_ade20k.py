# CoAtNet-1 (rw) + UPerNet on ADE20K: 4 GPUs x 4 images, 512 x 512 crops, 160k iterations.
# The recipe is ours: that of VOLO with the stochastic depth of the CoAtNet paper.
from mmengine.config import read_base

with read_base():
    from ._base_.ade20k import *
    from ._base_.schedule_160k import *
    from ._base_.upernet import *

from mmseg_volo import CoAtNet

model.update(
    data_preprocessor=dict(size=crop_size, mean=[127.5] * 3, std=[127.5] * 3),  # as the weights were trained
    backbone=dict(
        type=CoAtNet,
        arch='1_rw',
        img_size=crop_size,
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='timm://coatnet_1_rw_224.sw_in1k'),
    ),
    neck=None,
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=num_classes),
    auxiliary_head=dict(in_channels=384, num_classes=num_classes),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),
)
