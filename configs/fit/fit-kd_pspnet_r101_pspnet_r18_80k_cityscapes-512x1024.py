# FIT with plain distillation on Cityscapes, PSPNet R101 -> R18.
_base_ = '../kd/kd_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py'
model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    dict(type='mmdistill_ext.StartCheckHook', check_labels=500, check_teacher=False),
    dict(type='mmdistill_ext.TeacherShareHook', interval=50),
    dict(type='mmdistill_ext.ContrastMaskHook', interval=1000, max_images=2),
    dict(type='mmdistill_ext.FitHook', interval=1000, batches=8, window=4000),
]
