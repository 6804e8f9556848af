"""Detectors that train in milliseconds, one per head family, and a batch with every odd case."""

from pathlib import Path

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from mmdistill_ext.distillers.build import build_model

CLASSES = ('car', 'traffic light', 'dog')
STRIDES = [8, 16, 32]
SIZES = ((60, 90), (64, 80), (40, 56))  # padded to 64 x 96; the last image's own ends at 64 x 64
GN = dict(type='GN', num_groups=2, requires_grad=True)
FOCAL = dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
QFL = dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0)
GIOU = dict(type='GIoULoss', loss_weight=2.0)
POINTS = dict(type='DistancePointBBoxCoder')
DELTAS = dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])
ANCHOR = dict(
    type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES
)
ATSS_ASSIGNER = dict(type='ATSSAssigner', topk=9, ignore_iof_thr=0.5)


def detector(kind: str, head: dict, assigner: dict | None, channels: int) -> dict:
    """Return a ResNet-18 with an FPN of three levels and a head; its BNs stay in eval mode."""
    train_cfg = dict(assigner=assigner, allowed_border=-1, pos_weight=-1, debug=False)
    return dict(
        type=kind,
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[127.5] * 3,
            std=[64.0] * 3,
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=channels,
            stem_channels=channels,
            frozen_stages=-1,
            norm_eval=True,
        ),
        neck=dict(
            type='FPN',
            in_channels=[channels * 2**i for i in range(4)],
            out_channels=8,
            start_level=1,
            num_outs=3,
        ),
        bbox_head=dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1, **head),
        train_cfg=train_cfg if assigner else None,
        test_cfg=dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5)),
    )


def retina(channels: int = 8, softmax: bool = False, **head: object) -> dict:
    """Return RetinaNet with three anchors per location."""
    loss = dict(type='CrossEntropyLoss', use_sigmoid=False) if softmax else FOCAL
    default = dict(
        type='RetinaHead',
        anchor_generator={**ANCHOR, 'ratios': [0.5, 1.0, 2.0]},
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=loss,
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    )
    assigner = dict(
        type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=0.5
    )
    cfg = detector('RetinaNet', {**default, **head}, assigner, channels)
    cfg['train_cfg']['sampler'] = dict(type='PseudoSampler')
    return cfg


def atss(channels: int = 8, **head: object) -> dict:
    """Return ATSS."""
    default = dict(
        type='ATSSHead',
        anchor_generator=ANCHOR,
        bbox_coder=DELTAS,
        loss_cls=FOCAL,
        loss_bbox=GIOU,
        norm_cfg=GN,
    )
    return detector('ATSS', {**default, **head}, ATSS_ASSIGNER, channels)


def gfl(channels: int = 8, **head: object) -> dict:
    """Return GFL with 8 distances per side."""
    default = dict(
        type='GFLHead',
        anchor_generator=ANCHOR,
        reg_max=7,
        loss_cls=QFL,
        loss_bbox=GIOU,
        norm_cfg=GN,
    )
    return detector('GFL', {**default, **head}, ATSS_ASSIGNER, channels)


def rtmdet(channels: int = 8, **head: object) -> dict:
    """Return RTMDet's usual head."""
    default = dict(
        type='RTMDetSepBNHead',
        anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
        bbox_coder=POINTS,
        loss_cls=QFL,
        loss_bbox=GIOU,
        norm_cfg=GN,
        with_objectness=False,
        exp_on_reg=True,
    )
    assigner = dict(type='DynamicSoftLabelAssigner', topk=5)
    return detector('RTMDet', {**default, **head}, assigner, channels)


def fcos(channels: int = 8, norm_on_bbox: bool = False, **head: object) -> dict:
    """Return FCOS."""
    default = dict(
        type='FCOSHead',
        strides=STRIDES,
        regress_ranges=((-1, 24), (24, 48), (48, 1e8)),
        norm_on_bbox=norm_on_bbox,
        loss_cls=FOCAL,
        loss_bbox=GIOU,
        norm_cfg=GN,
    )
    return detector('FCOS', {**default, **head}, None, channels)


def fcos_norm(channels: int = 8, **head: object) -> dict:
    """Return FCOS whose distances are in strides while it trains."""
    return fcos(channels, norm_on_bbox=True, **head)


def yolox(channels: int = 8, **head: object) -> dict:
    """Return YOLOX; its positive units have a class, all have an objectness."""
    default = dict(type='YOLOXHead', strides=STRIDES, norm_cfg=GN)
    assigner = dict(type='SimOTAAssigner', center_radius=2.5)
    return detector('YOLOX', {**default, **head}, assigner, channels)


FAMILIES = dict(
    retina=retina,
    atss=atss,
    gfl=gfl,
    rtmdet=rtmdet,
    fcos=fcos,
    fcos_norm=fcos_norm,
    yolox=yolox,
)


def build(cfg: dict, seed: int) -> nn.Module:
    """Build a detector whose scores and boxes differ from place to place."""
    torch.manual_seed(seed)
    model = build_model({'_scope_': 'mmdet', **cfg})
    vary(model)
    return model


def vary(model: nn.Module) -> None:
    """Draw the head's weights wide enough for varied predictions; boxes are not empty."""
    head = model.bbox_head
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
        if hasattr(head, 'conv_reg') and hasattr(head, 'scales'):  # FCOS's kind
            head.conv_reg.bias.fill_(3.0)
        if hasattr(head, 'center_prior'):  # AutoAssign
            head.center_prior.sigma.fill_(1.0)
        if hasattr(head, 'reppoints_pts_init_out'):
            head.reppoints_pts_init_out.bias.normal_(0, 2)


def save_weights(path: Path, cfg: dict, seed: int) -> str:
    """Save such a detector as a checkpoint."""
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=build(cfg, seed).state_dict(), meta=meta), path)
    return str(path)


def sample(size: tuple[int, int], boxes: list, labels: list, ignored: list) -> DetDataSample:
    """Return a data sample as the pipeline packs it."""
    found = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    found.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
    )
    found.ignored_instances = InstanceData(
        bboxes=torch.tensor(ignored, dtype=torch.float32).reshape(-1, 4)
    )
    return found


def raw(boxes: bool = True) -> dict:
    """Return three images of different sizes, the second without a box, or all of them."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES
    ]
    truth = [
        ([[6, 8, 40, 44], [36, 10, 84, 56], [4, 30, 22, 50]], [0, 2, 1], [[60, 0, 90, 30]]),
        ([], [], [[0, 0, 32, 32]]),
        ([[10, 6, 44, 36]], [2], []),
    ]
    return dict(
        inputs=images,
        data_samples=[
            sample(size, *(found if boxes else ([], [], [])))
            for size, found in zip(SIZES, truth, strict=True)
        ],
    )


def batch(model: nn.Module, boxes: bool = True) -> tuple[torch.Tensor, list]:
    """Return them as they leave the model's preprocessor: normalised, padded to 64 x 96."""
    data = model.data_preprocessor(raw(boxes), training=True)
    return data['inputs'], data['data_samples']


def faster_rcnn() -> dict:
    """Return the smallest two-stage detector."""
    cfg = retina()
    cfg.pop('bbox_head')
    rcnn = dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
        sampler=dict(type='RandomSampler', num=8, pos_fraction=0.25),
    )
    return {
        **cfg,
        'type': 'FasterRCNN',
        'rpn_head': dict(
            type='RPNHead',
            in_channels=8,
            feat_channels=8,
            anchor_generator=ANCHOR,
        ),
        'roi_head': dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=2, sampling_ratio=0),
                out_channels=8,
                featmap_strides=STRIDES,
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=8,
                fc_out_channels=8,
                roi_feat_size=2,
                num_classes=3,
            ),
        ),
        'train_cfg': dict(rpn={**cfg['train_cfg']}, rcnn=rcnn),
        'test_cfg': dict(
            rpn=dict(nms_pre=10, max_per_img=10, nms=dict(type='nms', iou_threshold=0.7)),
            rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
        ),
    }
