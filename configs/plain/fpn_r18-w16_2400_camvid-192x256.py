# The student's warm start: 2,400 iterations from scratch, before it meets a teacher or goes on
# alone.
_base_ = './fpn_r18-w16_600_camvid-192x256.py'
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=2e-4, power=0.9, by_epoch=False, begin=50, end=2400),
]
train_cfg = dict(max_iters=2400, val_interval=1200)
default_hooks = dict(checkpoint=dict(interval=1200))
randomness = dict(seed=0)
