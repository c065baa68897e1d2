# VOLO-D5 + UPerNet on Cityscapes, FSDP2: 8 GPUs x 1 images, 1024 x 1024 crops, 80k iterations.
from mmengine.config import read_base

with read_base():
    from ._base_.cityscapes import *
    from ._base_.runtime import *
    from ._base_.schedule_80k import *
    from ._base_.upernet import *

from mmseg_volo import VOLO

model.update(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        type=VOLO,
        arch='d5',
        img_size=crop_size,
        drop_path_rate=0.75,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://volo_d5_512.sail_in1k'),
    ),
    neck=dict(in_channels=[384, 768, 768, 768], out_channels=256),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=num_classes),
    auxiliary_head=dict(in_channels=256, num_classes=num_classes),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(768, 768)),
)
train_dataloader.update(batch_size=1)
runner_type = 'ShardedRunner'  # gradients and moments in shares, one per process: docs/distributed.md
