# volo_d5_cityscapes with FSDP2: 8 GPUs x 1 image, gradients and optimizer state sharded. See docs/distributed.md.
from mmengine.config import read_base

with read_base():
    from ..volo_d5_cityscapes import *

train_dataloader.update(batch_size=1)
runner_type = 'ShardedRunner'
