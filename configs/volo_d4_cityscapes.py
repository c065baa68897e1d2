# VOLO-D4 + UPerNet on Cityscapes: 4 GPUs x 2 images, 1024 x 1024 crops, 80k iterations.
from mmengine.config import read_base

with read_base():
    from .volo_d1_cityscapes import *

model.backbone.update(
    arch='d4',
    drop_path_rate=0.5,
    with_cp=True,  # fits cards of 24 GB; False is faster where memory allows
    init_cfg=dict(checkpoint='timm://volo_d4_448.sail_in1k'),
)
model.neck.update(in_channels=[384, 768, 768, 768])
