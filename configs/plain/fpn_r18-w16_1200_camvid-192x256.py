# The thin semantic FPN alone on CamVid: 1,200 iterations from scratch.
_base_ = './fpn_r18-w16_600_camvid-192x256.py'
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-6, power=0.9, by_epoch=False, begin=50, end=1200),
]
train_cfg = dict(max_iters=1200, val_interval=300)
