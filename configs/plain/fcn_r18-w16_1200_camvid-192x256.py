# The thin FCN alone on CamVid: 1,200 iterations from scratch.
_base_ = [
    '../_base_/models/fcn_r18-w16.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_600.py',
    '../_base_/seg_runtime.py',
]
crop_size = (192, 256)
model = dict(data_preprocessor=dict(size=crop_size))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-6, power=0.9, by_epoch=False, begin=50, end=1200),
]
train_cfg = dict(max_iters=1200, val_interval=300)
