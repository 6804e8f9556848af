# FIT with SEL on COCO, DINO R50 -> R18. The base is small: the loss is a sum over all layers.
_base_ = '../selective/sel_dino_r50_dino_r18_12e_coco.py'
model = dict(fit=dict(function=dict(type='ExponentialFit', b=1.4), split='unit'))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdistill_ext.FitHook', interval=1000, batches=32, window=4000, measure_train=True),
]
