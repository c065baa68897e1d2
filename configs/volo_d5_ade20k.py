# VOLO-D5 + UPerNet on ADE20K: 4 GPUs x 4 images, 512 x 512 crops, 160k iterations.
from mmengine.config import read_base

with read_base():
    from .volo_d1_ade20k import *

model.backbone.update(arch='d5', drop_path_rate=0.75, init_cfg=dict(checkpoint='timm://volo_d5_512.sail_in1k'))
model.neck.update(in_channels=[384, 768, 768, 768])
