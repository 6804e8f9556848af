# What a run of several networks adds to a plain one: weights from the validation, the best network.
custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
custom_hooks = [dict(type='mmdistill_ext.CollaborationHook')]
