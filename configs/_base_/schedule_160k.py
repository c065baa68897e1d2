# As schedule_80k, with twice the iterations and twice the images per iteration.
from mmengine.config import read_base

with read_base():
    from .schedule_80k import *

max_iters = 160000
param_scheduler[1].update(end=max_iters)
auto_scale_lr.update(base_batch_size=16)
train_cfg.update(max_iters=max_iters, val_interval=16000)
default_hooks.checkpoint.update(interval=16000)
