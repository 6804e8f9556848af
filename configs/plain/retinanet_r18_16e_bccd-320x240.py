# The good BCCD teacher: 16 epochs from scratch (mAP 0.45).
_base_ = [
    '../_base_/models/retinanet_r18.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/adamw_8e.py',
    '../_base_/det_runtime.py',
]
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        begin=0,
        end=16,
        T_max=16,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=16, val_interval=8)
randomness = dict(seed=0)
