# Plain distillation with the fit loss (FIT): when overfitting shows, the locations that the teacher
# gets wrong count less. Both means reach 150 iterations back; the first 150, in which BatchNorm's
# statistics settle, are left out.
_base_ = './student_kd.py'

model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    dict(
        type='mmdistill_ext.FitHook',
        interval=30,
        batches=1,
        window=150,
        begin=150,
        measure_train=True,
    ),
]
