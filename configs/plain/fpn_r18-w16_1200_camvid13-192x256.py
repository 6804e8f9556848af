# The student alone on thirteen images of CamVid, 1,200 iterations on from its warm start (set
# load_from).
_base_ = [
    '../_base_/models/fpn_r18-w16.py',
    '../_base_/datasets/camvid13.py',
    '../_base_/schedules/adamw_600.py',
    '../_base_/seg_runtime.py',
]
model = dict(data_preprocessor=dict(size=(192, 256)))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-6, power=0.9, by_epoch=False, begin=50, end=1200),
]
train_cfg = dict(max_iters=1200, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=1200))
