# 160k iterations of 16 images, AdamW, linear decay after warm-up. Sources of the values: docs/recipes.md.
from mmengine.config import read_base

with read_base():
    from .schedule_80k import *

max_iters = 160000
param_scheduler[1].update(end=max_iters)
auto_scale_lr.update(base_batch_size=16)
train_cfg.update(max_iters=max_iters, val_interval=16000)
default_hooks.update(checkpoint=dict(interval=16000))
