# Plain distillation with the fit loss (FIT): when overfitting shows, the pixels that the teacher
# gets wrong count less. Both means reach 100 iterations back; the first 100, in which BatchNorm's
# statistics settle, are left out.
_base_ = './student_kd.py'

model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    dict(
        type='mmdistill_ext.FitHook',
        interval=20,
        batches=1,
        window=100,
        begin=100,
        measure_train=True,
    ),
]
