# SEL on CamVid: the teacher is followed only where it beats the student. Set
# model.teacher.checkpoint, and load_from for a warm start.
_base_ = '../kd/kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py'
model = dict(
    losses=dict(
        _delete_=True,
        sel=dict(type='SelectiveLoss', temperature=2.0, average='selected', weight=1.0),
    )
)
