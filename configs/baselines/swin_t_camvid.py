# Swin-T (mmseg) + UPerNet on CamVid from random weights, a baseline for volo_d1_camvid; other settings are equal.
from mmengine.config import read_base

with read_base():
    from ..volo_d1_camvid import *

model.update(
    neck=None,
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
model.backbone = dict(type='SwinTransformer', drop_path_rate=0.1)
