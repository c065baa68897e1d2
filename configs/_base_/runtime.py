# Settings of every run, on a CPU, one GPU or many. The schedules read this file.
from mmseg_volo import (
    CPUMemoryHook,
    DurableCheckpointHook,
    IterationSeedHook,
    NonFiniteLossHook,
    OneClassWarningHook,
    SlidingTTAModel,
    ValidationPicturesHook,
)

default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
sync_bn = 'torch'  # BatchNorm becomes SyncBatchNorm in distributed training only
log_processor = dict(by_epoch=False)
log_level = 'INFO'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type=DurableCheckpointHook, by_epoch=False, interval=8000, max_keep_ckpts=2, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    iteration_seed=dict(type=IterationSeedHook),
    non_finite=dict(type=NonFiniteLossHook),
    visualization=dict(type='SegVisualizationHook'),
)
custom_hooks = [dict(type=CPUMemoryHook), dict(type=ValidationPicturesHook), dict(type=OneClassWarningHook)]
load_from = None
resume = False

vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
tta_model = dict(type=SlidingTTAModel)
