# A GFL and an ATSS learn BCCD together, eight epochs from scratch.
_base_ = [
    '../plain/gfl_r18-w16_8e_bccd-320x240.py',
    '../_base_/collaborative_runtime.py',
]
model = dict(
    _delete_=True,
    type='mmdistill_ext.CollaborativeDistiller',
    students=dict(
        gfl={{_base_.model}},
        atss='mmdistill_ext::plain/atss_r18-w16_8e_bccd-320x240.py',
    ),
    second=dict(type='MinLoss'),
    reference='gfl',
    kl=dict(weight=1.0, warmup=200),
)
val_evaluator = dict(
    _delete_=True, type='mmdistill_ext.NetworksEvaluator', metrics={{_base_.val_evaluator}}
)
test_evaluator = val_evaluator
