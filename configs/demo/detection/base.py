# What every run of the detection demo shares: data, schedule, runtime. Minutes on a CPU.
_base_ = ['../../_base_/datasets/digit_scenes_det.py', '../../_base_/det_runtime.py']

train_cfg = dict(type='IterBasedTrainLoop', max_iters=900, val_interval=150)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=900, T_max=850),
]
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=900, save_optimizer=False),
)
log_processor = dict(by_epoch=False, window_size=20)
randomness = dict(seed=0)
