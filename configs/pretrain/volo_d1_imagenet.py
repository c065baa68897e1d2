# VOLO-D1 classifier on ImageNet with token labels: 8 GPUs x 128 images, 224 x 224 crops, 300 epochs. Not run.
from mmengine.config import read_base

with read_base():
    from ._base_.token_labels import *

data_root = 'data/imagenet'
img_size, num_classes = 224, 1000
epoch = 1251  # iterations: 1281167 images / 1024

model.backbone.update(arch='d1', img_size=img_size, num_classes=num_classes, drop_path_rate=0.1)
train_dataloader.dataset.pipeline[5].update(scale=img_size)
val_dataloader.dataset.pipeline[1].update(scale=233)  # 224 / 0.96
val_dataloader.dataset.pipeline[2].update(crop_size=img_size)
train_dataloader.update(batch_size=128)
train_dataloader.dataset.update(data_root=data_root)
val_dataloader.update(batch_size=128)
val_dataloader.dataset.update(data_root=data_root)
val_evaluator.update(topk=(1, 5))

optim_wrapper.optimizer.update(lr=1.6e-3)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
param_scheduler[0].update(start_factor=1e-6 / 1.6e-3, end=20 * epoch)
param_scheduler[1].update(begin=20 * epoch, end=300 * epoch)
train_cfg.update(max_iters=300 * epoch, val_interval=epoch)
default_hooks.checkpoint.update(interval=epoch)
