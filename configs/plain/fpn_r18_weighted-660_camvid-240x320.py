# The better CamVid teacher: the weak one, then 660 iterations with class-weighted cross-entropy.
# Set load_from to the weak one's checkpoint.
_base_ = './fpn_r18_1800_camvid-240x320.py'
class_weight = [1.0, 0.9, 3.0, 0.7, 1.6, 1.2, 3.0, 3.0, 1.5, 3.5, 4.0]
model = dict(decode_head=dict(loss_decode=dict(class_weight=class_weight)))
optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=1e-6, power=0.9, by_epoch=False, begin=30, end=660),
]
train_cfg = dict(max_iters=660, val_interval=660)
default_hooks = dict(checkpoint=dict(interval=660))
randomness = dict(seed=1)
