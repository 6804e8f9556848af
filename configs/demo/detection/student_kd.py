# The student with plain distillation of classes and boxes: the teacher is believed everywhere.
# The teacher's weights: --cfg-options model.teacher.checkpoint=FILE
_base_ = './student.py'

custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='{{ fileDirname }}/teacher.py',
        checkpoint='work_dirs/demo_detection/runs/teacher/iter_900.pth',
    ),
    losses=dict(kd=dict(type='KDLoss', average='positive', box=dict(distance='distribution'))),
)
