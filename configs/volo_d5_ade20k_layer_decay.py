# VOLO-D5 + UPerNet on ADE20K, layer-wise learning-rate decay: 4 GPUs x 4 images, 512 x 512 crops, 160k iterations.
from mmengine.config import read_base

with read_base():
    from .volo_d5_ade20k import *

# Learning rates shrink towards the stem. Sources of the values: docs/recipes.md.
optim_wrapper.update(constructor='VOLOLayerDecayConstructor')
optim_wrapper.paramwise_cfg = dict(decay_rate=0.9)
