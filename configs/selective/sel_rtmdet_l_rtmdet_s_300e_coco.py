# SEL on COCO, RTMDet l -> s.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/'
        'rtmdet/rtmdet_l_8xb32-300e_coco/'
        'rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth',
    ),
    losses=dict(
        sel=dict(type='SelectiveLoss', average='positive', box=dict(distance='iou'), weight=1.0),
    ),
)
custom_hooks = [
    *_base_.custom_hooks,  # the average of the weights, and the pipeline of the last epochs
    dict(type='mmdistill_ext.StartCheckHook', check_labels=500, check_teacher=False),
    dict(type='mmdistill_ext.TeacherShareHook', interval=50),
    dict(type='mmdistill_ext.ContrastMaskHook', interval=200, max_images=4),
]
