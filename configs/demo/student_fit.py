# Plain distillation with the fit loss (FIT): when overfitting shows, the pixels that the teacher
# gets wrong count less. Both means reach 100 iterations back.
_base_ = './student_kd.py'

model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    dict(type='mmdistill_ext.FitHook', interval=20, batches=1, window=100, measure_train=True),
]
