# FIT with SEL on COCO, RetinaNet R101 -> R18.
_base_ = '../selective/sel_retinanet_r101_retinanet_r18_1x_coco.py'
model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdistill_ext.FitHook', interval=1000, batches=32, window=4000, measure_train=True),
]
