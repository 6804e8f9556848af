# SEL on COCO, GFL R101 -> R18.
_base_ = ['../plain/gfl_r18_1x_coco.py', '../_base_/distill_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/'
        'gfl/gfl_r101_fpn_mstrain_2x_coco/'
        'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth',
    ),
    losses=dict(
        sel=dict(
            type='SelectiveLoss', average='positive', box=dict(distance='distribution'), weight=1.0
        ),
    ),
)
