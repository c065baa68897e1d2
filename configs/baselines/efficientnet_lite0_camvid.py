# EfficientNet-Lite0 (timm) + UPerNet on CamVid from ImageNet weights, with the head of volo_tiny_camvid.
# 1 process x 8 images, 240 x 320 crops. Weights: tools/efficientnet_lite0_weights.py.
from mmengine.config import read_base

with read_base():
    from ..volo_tiny_camvid import *
    from .._base_.schedule_scratch import *  # instead of the schedule of volo_tiny_camvid

model.data_preprocessor.update(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
model.update(
    neck=None,
    decode_head=dict(in_channels=[24, 40, 112, 320]),
    auxiliary_head=dict(in_channels=112),
)
model.backbone = dict(
    type='TIMMBackbone',
    model_name='tf_efficientnet_lite0',
    features_only=True,
    pretrained=False,
    out_indices=(1, 2, 3, 4),
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/tf_efficientnet_lite0.pth'),
)
train_dataloader.update(batch_size=8)
optim_wrapper.optimizer.update(lr=2e-3)
