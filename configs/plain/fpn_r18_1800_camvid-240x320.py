# The weak CamVid teacher: 1,800 iterations from scratch (mIoU 45).
_base_ = [
    '../_base_/models/fpn_r18.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_600.py',
    '../_base_/seg_runtime.py',
]
train_dataloader = dict(batch_size=6)

param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=1e-6, power=0.9, by_epoch=False, begin=100, end=1800),
]
train_cfg = dict(max_iters=1800, val_interval=900)
default_hooks = dict(checkpoint=dict(interval=900))
randomness = dict(seed=0)
