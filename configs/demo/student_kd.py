# The student with plain distillation: the teacher is believed everywhere.
# The teacher's weights: --cfg-options model.teacher.checkpoint=FILE
_base_ = './student.py'

custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='{{ fileDirname }}/teacher.py', checkpoint='work_dirs/demo/teacher/iter_600.pth'
    ),
    losses=dict(kd=dict(type='KDLoss', temperature=2.0)),
)
