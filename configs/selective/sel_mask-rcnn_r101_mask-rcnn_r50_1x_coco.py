# SEL on COCO, Mask R-CNN R101 -> R50: classes, boxes and masks.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/distill_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdet::mask_rcnn/mask-rcnn_r101_fpn_ms-poly-3x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/'
        'mask_rcnn/mask_rcnn_r101_fpn_mstrain-poly_3x_coco/'
        'mask_rcnn_r101_fpn_mstrain-poly_3x_coco_20210524_200244-5675c317.pth',
    ),
    losses=dict(
        sel=dict(type='SelectiveLoss', box=dict(distance='iou'), weight=1.0),
        sel_mask=dict(type='SelectiveLoss', head='roi_head.mask_head', weight=1.0),
    ),
)
