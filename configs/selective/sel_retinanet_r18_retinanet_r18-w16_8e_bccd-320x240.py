# SEL on BCCD: class and box of every anchor follow the teacher where it beats the student.
_base_ = '../kd/kd_retinanet_r18_retinanet_r18-w16_8e_bccd-320x240.py'
model = dict(
    losses=dict(
        _delete_=True,
        sel=dict(type='SelectiveLoss', average='positive', box=dict(distance='iou'), weight=1.0),
    )
)
