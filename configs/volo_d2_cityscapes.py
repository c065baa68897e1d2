# VOLO-D2 + UPerNet on Cityscapes: 4 GPUs x 2 images, 1024 x 1024 crops, 80k iterations.
from mmengine.config import read_base

with read_base():
    from .volo_d1_cityscapes import *

model.backbone.update(arch='d2', drop_path_rate=0.2, init_cfg=dict(checkpoint='timm://volo_d2_384.sail_in1k'))
model.neck.update(in_channels=[256, 512, 512, 512])
