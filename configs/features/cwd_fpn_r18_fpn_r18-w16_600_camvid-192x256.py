# Channel-wise distillation of the finest map of the neck and of the logits. Set
# model.teacher.checkpoint, and load_from for a warm start.
_base_ = ['../plain/fpn_r18-w16_600_camvid-192x256.py', '../_base_/feature_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdistill_ext::plain/fpn_r18_1800_camvid-240x320.py',
        checkpoint='checkpoints/camvid_fpn-r18.pth',
    ),
    losses=dict(
        neck=dict(type='CWDLoss', tap='neck.0', connector=dict(type='Conv1x1'), weight=0.2),
        logits=dict(type='CWDLoss', tap='decode_head', weight_by='labels', weight=3.0),
    ),
)
