# SEL on COCO, ATSS R101 -> R50.
_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py', '../_base_/distill_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdet::atss/atss_r101_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/atss/atss_r101_fpn_1x_coco/'
        'atss_r101_fpn_1x_20200825-dfcadd6f.pth',
    ),
    losses=dict(
        sel=dict(type='SelectiveLoss', average='positive', box=dict(distance='iou'), weight=1.0),
    ),
)
