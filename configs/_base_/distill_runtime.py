# What a run with a teacher adds to a plain one: checks at the start, shares and pictures in the
# log.
custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
custom_hooks = [
    dict(type='mmdistill_ext.StartCheckHook', check_labels=500, check_teacher=False),
    dict(type='mmdistill_ext.TeacherShareHook', interval=50),
    dict(type='mmdistill_ext.ContrastMaskHook', interval=200, max_images=4),
]
