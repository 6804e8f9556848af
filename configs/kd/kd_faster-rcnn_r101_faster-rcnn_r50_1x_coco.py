# Plain distillation on COCO, Faster R-CNN R101 -> R50.
_base_ = '../selective/sel_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py'
model = dict(
    losses=dict(
        _delete_=True,
        kd=dict(type='KDLoss', box=dict(distance='iou'), weight=1.0),
    )
)
