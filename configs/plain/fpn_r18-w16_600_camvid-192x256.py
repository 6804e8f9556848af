# The CamVid student alone, 600 iterations on from its warm start (set load_from).
_base_ = [
    '../_base_/models/fpn_r18-w16.py',
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
