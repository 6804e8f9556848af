# SEL on BCCD with GFL: class and box distribution follow the teacher where it beats the student.
_base_ = '../kd/kd_gfl_r18_gfl_r18-w16_8e_bccd-320x240.py'
model = dict(
    losses=dict(
        _delete_=True,
        sel=dict(
            type='SelectiveLoss', average='positive', box=dict(distance='distribution'), weight=1.0
        ),
    )
)
