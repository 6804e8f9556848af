# Plain distillation on thirteen images. Set model.teacher.checkpoint and load_from.
_base_ = ['../plain/fpn_r18-w16_1200_camvid13-192x256.py', '../_base_/distill_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdistill_ext::plain/fpn_r18_1800_camvid-240x320.py',
        checkpoint='checkpoints/camvid_fpn-r18.pth',
    ),
    fuse_task_loss=True,
    losses=dict(kd=dict(type='KDLoss', temperature=2.0, weight=1.0)),
)
