# Plain distillation of classes and of the boxes' distributions on BCCD. Set
# model.teacher.checkpoint.
_base_ = ['../plain/gfl_r18-w16_8e_bccd-320x240.py', '../_base_/distill_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdistill_ext::plain/gfl_r18_24e_bccd-320x240.py',
        checkpoint='checkpoints/bccd_gfl-r18.pth',
    ),
    losses=dict(
        kd=dict(type='KDLoss', average='positive', box=dict(distance='distribution'), weight=1.0)
    ),
)
