# Features of the neck on COCO, RetinaNet R101 -> R18, weighed by the teacher's class score.
_base_ = '../selective/sel_retinanet_r101_retinanet_r18_1x_coco.py'
model = dict(
    losses=dict(
        _delete_=True,
        neck=dict(
            type='FeatureLoss',
            tap='neck',
            connector=dict(type='Conv1x1'),
            weight_by='teacher_score',
            weight=1.0,
        ),
    )
)
custom_hooks = [dict(type='mmdistill_ext.StartCheckHook')]
