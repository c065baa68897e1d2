# CoAtNet-2 (rmlp, rw) + UPerNet on ADE20K: 4 GPUs x 4 images, 512 x 512 crops, 160k iterations.
# The recipe is ours: that of VOLO with the stochastic depth of the CoAtNet paper.
from mmengine.config import read_base

with read_base():
    from .coatnet_1_rw_ade20k import *

model.backbone.update(
    arch='rmlp_2_rw',
    drop_path_rate=0.5,
    init_cfg=dict(checkpoint='timm://coatnet_rmlp_2_rw_384.sw_in12k_ft_in1k'),
)
model.decode_head.update(in_channels=[128, 256, 512, 1024])
model.auxiliary_head.update(in_channels=512)
