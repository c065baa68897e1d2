# ResNet-50 (timm) + UPerNet on CamVid from random weights, a baseline for volo_d1_camvid; other settings are equal.
from mmengine.config import read_base

with read_base():
    from ..volo_d1_camvid import *

model.update(
    neck=None,
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
model.backbone = dict(
    type='TIMMBackbone', model_name='resnet50', features_only=True, pretrained=False, out_indices=(1, 2, 3, 4)
)
