# What a run with losses of features adds to a plain one: checks at the start.
custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
custom_hooks = [
    dict(type='mmdistill_ext.StartCheckHook', check_labels=500, check_teacher=False),
]
