# FIT with plain distillation on thirteen images: when overfitting shows, the pixels that the
# teacher gets wrong count less. Set model.teacher.checkpoint and load_from.
_base_ = '../kd/kd_fpn_r18_fpn_r18-w16_1200_camvid13-192x256.py'
model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    dict(type='mmdistill_ext.StartCheckHook', check_labels=500, check_teacher=False),
    dict(type='mmdistill_ext.TeacherShareHook', interval=50),
    dict(type='mmdistill_ext.ContrastMaskHook', interval=400, max_images=4),
    dict(type='mmdistill_ext.FitHook', interval=50, batches=4, window=200, measure_train=True),
]
