# The student with the selective teacher (SEL): believed only where it beats the student.
_base_ = './student_kd.py'

model = dict(
    losses=dict(_delete_=True, sel=dict(type='SelectiveLoss', temperature=2.0)),
)
custom_hooks = [dict(type='mmdistill_ext.TeacherShareHook')]
