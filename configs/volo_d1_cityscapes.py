# VOLO-D1 + UPerNet on Cityscapes: 4 GPUs x 2 images, 1024 x 1024 crops, 80k iterations.
from mmengine.config import read_base

with read_base():
    from ._base_.cityscapes import *
    from ._base_.schedule_80k import *
    from ._base_.upernet import *

from mmseg_volo import VOLO

model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type=VOLO,
        arch='d1',
        img_size=crop_size,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='timm://volo_d1_384.sail_in1k'),
    ),
    neck=dict(in_channels=[192, 384, 384, 384], out_channels=256),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=num_classes),
    auxiliary_head=dict(in_channels=256, num_classes=num_classes),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(768, 768)),
)
