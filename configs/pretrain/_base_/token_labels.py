# Images in a folder per class, with token labels, for mmseg-volo pretrain. Each config sets sizes and classes.
from mmengine.config import read_base

with read_base():
    from ..._base_.runtime import *

from mmseg_volo import BeginSample, CPUMemoryHook, StreamSampler
from mmseg_volo.models.classifiers import VOLOClassifier
from mmseg_volo.pretraining.data import (
    CropWithLabels,
    FlipWithLabels,
    LoadTokenLabels,
    RandAugmentWithLabels,
    TokenLabelDataset,
)
from mmseg_volo.pretraining.model import TokenLabelClassifier

default_scope = 'mmpretrain'
mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
model = dict(
    type=TokenLabelClassifier,
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=mean, std=std, to_rgb=True),
    backbone=dict(type=VOLOClassifier),
)

train_dataloader = dict(
    num_workers=8,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type=StreamSampler),
    dataset=dict(
        type=TokenLabelDataset,
        data_prefix=dict(img_path='train', label_path='token_labels'),
        # The order of the published code: the crop comes after the transforms that move tokens.
        pipeline=[
            dict(type=BeginSample),
            dict(type='LoadImageFromFile'),
            dict(type=LoadTokenLabels),
            dict(type=FlipWithLabels, prob=0.5, direction='horizontal'),
            dict(
                type=RandAugmentWithLabels,
                policies='timm_increasing',
                num_policies=2,
                magnitude_level=9,
                magnitude_std=0.5,
                hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
            ),
            dict(type=CropWithLabels, backend='pillow', interpolation='bicubic'),
            dict(
                type='RandomErasing',
                erase_prob=0.25,
                mode='rand',
                min_area_ratio=0.02,
                max_area_ratio=1 / 3,
                fill_color=mean[::-1],
                fill_std=std[::-1],
            ),
            dict(type='PackInputs', algorithm_keys=['token_labels', 'crop']),
        ],
    ),
)
val_dataloader = dict(
    num_workers=8,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_prefix=dict(img_path='val'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='ResizeEdge', edge='short', backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop'),
            dict(type='PackInputs'),
        ],
    ),
)
val_evaluator = dict(type='Accuracy', topk=1)
val_cfg = dict(type='ValLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        flat_decay_mult=0.0,  # norms and biases
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, begin=0),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop')
default_hooks.pop('visualization')
default_hooks.checkpoint.update(save_best='accuracy/top1')
custom_hooks = [dict(type=CPUMemoryHook)]
visualizer.update(type='UniversalVisualizer')
tta_model = None
