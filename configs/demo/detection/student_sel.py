# The student with the selective teacher (SEL): believed only where it beats the student.
_base_ = './student_kd.py'

model = dict(
    losses=dict(
        _delete_=True,
        sel=dict(type='SelectiveLoss', average='positive', box=dict(distance='distribution')),
    ),
)
custom_hooks = [
    dict(type='mmdistill_ext.TeacherShareHook'),
    dict(type='mmdistill_ext.ContrastMaskHook', interval=300, max_images=4),
]
