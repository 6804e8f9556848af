# Decoupled distillation (DKD) on every labelled pixel. Set model.teacher.checkpoint, and load_from
# for a warm start.
_base_ = ['../plain/fpn_r18-w16_600_camvid-192x256.py', '../_base_/distill_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdistill_ext::plain/fpn_r18_1800_camvid-240x320.py',
        checkpoint='checkpoints/camvid_fpn-r18.pth',
    ),
    fuse_task_loss=True,
    losses=dict(dkd=dict(type='DKDLoss', alpha=1.0, beta=0.5, temperature=2.0, weight=1.0)),
)
