# Plain distillation on COCO, RetinaNet R101 -> R18.
_base_ = '../selective/sel_retinanet_r101_retinanet_r18_1x_coco.py'
model = dict(
    losses=dict(
        _delete_=True,
        kd=dict(type='KDLoss', average='positive', box=dict(distance='iou'), weight=1.0),
    )
)
