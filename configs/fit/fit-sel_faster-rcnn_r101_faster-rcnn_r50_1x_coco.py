# FIT with SEL on COCO, Faster R-CNN R101 -> R50.
_base_ = '../selective/sel_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py'
model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdistill_ext.FitHook', interval=1000, batches=32, window=4000, measure_train=True),
]
