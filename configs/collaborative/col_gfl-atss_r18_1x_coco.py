# GFL and ATSS on ResNet-18 learn COCO together, classes and boxes.
_base_ = ['../plain/gfl_r18_1x_coco.py', '../_base_/collaborative_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.CollaborativeDistiller',
    students=dict(
        gfl={{_base_.model}},
        atss='mmdistill_ext::plain/atss_r18_1x_coco.py',
    ),
    second=dict(type='MinLoss'),
    reference='gfl',
    kl=dict(weight=1.0, warmup=2000),
    box=dict(distance='iou'),
)
val_evaluator = dict(
    _delete_=True, type='mmdistill_ext.NetworksEvaluator', metrics={{_base_.val_evaluator}}
)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='ensemble/coco/bbox_mAP'))
