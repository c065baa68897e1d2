# VOLO-tiny classifier on a folder of images with token labels: 1 process x 32 images, 64 x 64 crops, 2000 iterations.
from mmengine.config import read_base

with read_base():
    from ._base_.token_labels import *

data_root = 'data/images'
img_size, num_classes = 64, 1000  # classes of the teacher
max_iters = 2000

model.backbone.update(arch='tiny', img_size=img_size, num_classes=num_classes, recompute_activations=False)
train_dataloader.dataset.pipeline[5].update(scale=img_size)
val_dataloader.dataset.pipeline[1].update(scale=img_size)
val_dataloader.dataset.pipeline[2].update(crop_size=img_size)
train_dataloader.update(batch_size=32, num_workers=1)
train_dataloader.dataset.update(data_root=data_root)
val_dataloader.update(batch_size=32, num_workers=1)
val_dataloader.dataset.update(data_root=data_root)

optim_wrapper.optimizer.update(lr=1e-3)
param_scheduler[0].update(start_factor=1e-3, end=100)
param_scheduler[1].update(begin=100, end=max_iters)
train_cfg.update(max_iters=max_iters, val_interval=400)
default_hooks.checkpoint.update(interval=400)
