# FIT with SEL on BCCD and a teacher that the student overtakes: when overfitting shows, what the
# teacher gets wrong counts less. Set model.teacher.checkpoint.
_base_ = '../selective/sel_gfl_r18_gfl_r18-w16_8e_bccd-320x240.py'
model = dict(fit=dict(function=dict(type='ExponentialFit', b=10.0), split='unit'))
custom_hooks = [
    dict(type='mmdistill_ext.StartCheckHook', check_labels=500, check_teacher=False),
    dict(type='mmdistill_ext.TeacherShareHook', interval=50),
    dict(type='mmdistill_ext.ContrastMaskHook', interval=200, max_images=4),
    dict(
        type='mmdistill_ext.FitHook',
        interval=26,
        batches=4,
        window=104,
        begin=104,
        measure_train=True,
    ),
]
