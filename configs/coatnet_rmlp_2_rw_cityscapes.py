# CoAtNet-2 (rmlp, rw) + UPerNet on Cityscapes: 4 GPUs x 2 images, 1024 x 1024 crops, 80k iterations.
# The recipe is ours: that of VOLO with the stochastic depth of the CoAtNet paper.
from mmengine.config import read_base

with read_base():
    from .coatnet_1_rw_cityscapes import *

model.backbone.update(
    arch='rmlp_2_rw',
    with_cp=True,  # saves memory; False is faster where memory allows
    drop_path_rate=0.5,
    init_cfg=dict(checkpoint='timm://coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k'),
)
model.decode_head.update(in_channels=[128, 256, 512, 1024])
model.auxiliary_head.update(in_channels=512)
