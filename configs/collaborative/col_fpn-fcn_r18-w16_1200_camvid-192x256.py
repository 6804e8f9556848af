# A semantic FPN (stride 4) and an FCN (stride 8) learn CamVid together, from scratch.
_base_ = [
    '../plain/fpn_r18-w16_1200_camvid-192x256.py',
    '../_base_/collaborative_runtime.py',
]
model = dict(
    _delete_=True,
    type='mmdistill_ext.CollaborativeDistiller',
    students=dict(
        fpn={{_base_.model}},
        fcn='mmdistill_ext::plain/fcn_r18-w16_1200_camvid-192x256.py',
    ),
    second=dict(type='MinLoss'),
    kl=dict(weight=1.0, temperature=2.0, warmup=600),
)
val_evaluator = dict(
    _delete_=True, type='mmdistill_ext.NetworksEvaluator', metrics={{_base_.val_evaluator}}
)
test_evaluator = val_evaluator
