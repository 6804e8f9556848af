"""Tiny single-stage detectors of further head families, beside those of :mod:`tests.tiny_det`."""

from mmengine.logging import MessageHub

from tests.tiny_det import (
    ANCHOR,
    ATSS_ASSIGNER,
    DELTAS,
    FOCAL,
    GIOU,
    GN,
    QFL,
    STRIDES,
    detector,
    retina,
)

BN = dict(type='BN', requires_grad=True)
SMOOTH_L1 = dict(type='SmoothL1Loss', beta=0.11, loss_weight=1.0)
RATIOS = {**ANCHOR, 'ratios': [0.5, 1.0, 2.0]}
SQUARE = dict(type='AnchorGenerator', ratios=[1.0], scales=[4], strides=STRIDES)
APPROX = dict(
    type='AnchorGenerator',
    octave_base_scale=4,
    scales_per_octave=2,
    ratios=[0.5, 1.0, 2.0],
    strides=STRIDES,
)
APPROX_ASSIGNER = dict(
    type='ApproxMaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1
)


def retina_sepbn(channels: int = 8, **head: object) -> dict:
    """Return RetinaNet whose levels have batch norms of their own, in eval mode's statistics."""
    return retina(channels, type='RetinaSepBNHead', num_ins=3, norm_cfg=None, **head)


def pisa(channels: int = 8, **head: object) -> dict:
    """Return RetinaNet with PISA."""
    cfg = retina(channels, type='PISARetinaHead', loss_bbox=SMOOTH_L1, **head)
    cfg['train_cfg'].update(isr=dict(k=2.0, bias=0.0), carl=dict(k=1.0, bias=0.2))
    return cfg


def free_anchor(channels: int = 8, **head: object) -> dict:
    """Return FreeAnchor with three anchors per location and ten in a bag."""
    default = dict(
        type='FreeAnchorRetinaHead',
        anchor_generator=RATIOS,
        bbox_coder=DELTAS,
        pre_anchor_topk=10,
        loss_bbox=SMOOTH_L1,
    )
    return detector('RetinaNet', {**default, **head}, None, channels)


def tood(channels: int = 8, initial_epoch: int = 0, **head: object) -> dict:
    """Return TOOD, from the first epoch on with the task-aligned assigner."""
    MessageHub.get_current_instance().update_info('epoch', 0)  # as a runner does
    default = dict(
        type='TOODHead',
        anchor_generator=ANCHOR,
        bbox_coder=DELTAS,
        initial_loss_cls={**FOCAL, 'activated': True},
        loss_cls={**QFL, 'activated': True},
        loss_bbox=GIOU,
        norm_cfg=GN,
    )
    assigner = dict(type='TaskAlignedAssigner', topk=5)
    cfg = detector('TOOD', {**default, **head}, assigner, channels)
    cfg['train_cfg'].update(
        initial_epoch=initial_epoch, initial_assigner=ATSS_ASSIGNER, alpha=1, beta=6
    )
    cfg['bbox_head']['stacked_convs'] = 2  # fewer leave its attention without a channel
    return cfg


def tood_initial(channels: int = 8, **head: object) -> dict:
    """Return TOOD in its initial epochs, with ATSS's assigner and a focal loss."""
    return tood(channels, initial_epoch=4, **head)


def vfnet(channels: int = 8, **head: object) -> dict:
    """Return VarifocalNet."""
    default = dict(
        type='VFNetHead',
        strides=STRIDES,
        regress_ranges=((-1, 24), (24, 48), (48, 1e8)),
        anchor_generator={**ANCHOR, 'center_offset': 0.0},
        norm_cfg=GN,
    )
    return detector('VFNet', {**default, **head}, ATSS_ASSIGNER, channels)


def vfnet_plain(channels: int = 8, **head: object) -> dict:
    """Return VarifocalNet with FCOS's targets and a focal loss."""
    return vfnet(channels, use_atss=False, use_vfl=False, **head)


def paa(channels: int = 8, **head: object) -> dict:
    """Return PAA."""
    default = dict(
        type='PAAHead',
        reg_decoded_bbox=True,
        topk=9,
        anchor_generator=ANCHOR,
        bbox_coder=DELTAS,
        loss_cls=FOCAL,
        loss_bbox=GIOU,
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=0.5),
        norm_cfg=GN,
    )
    assigner = dict(
        type='MaxIoUAssigner', pos_iou_thr=0.1, neg_iou_thr=0.1, min_pos_iou=0, ignore_iof_thr=0.5
    )
    return detector('PAA', {**default, **head}, assigner, channels)


def ddod(channels: int = 8, **head: object) -> dict:
    """Return DDOD."""
    default = dict(
        type='DDODHead',
        use_dcn=False,  # the coarsest maps are smaller than its kernel
        anchor_generator=ANCHOR,
        bbox_coder=DELTAS,
        loss_cls=FOCAL,
        loss_bbox=GIOU,
        norm_cfg=GN,
    )
    assigner = dict(type='ATSSAssigner', topk=4)
    cfg = detector('DDOD', {**default, **head}, {**assigner, 'alpha': 0.8}, channels)
    cfg['train_cfg']['reg_assigner'] = {**assigner, 'alpha': 0.3}
    return cfg


def fsaf(channels: int = 8, **head: object) -> dict:
    """Return FSAF."""
    default = dict(
        type='FSAFHead',
        reg_decoded_bbox=True,
        anchor_generator={**ANCHOR, 'octave_base_scale': 1},
        bbox_coder=dict(type='TBLRBBoxCoder', normalizer=4.0),
        loss_cls={**FOCAL, 'reduction': 'none'},
        loss_bbox=dict(type='IoULoss', eps=1e-6, loss_weight=1.0, reduction='none'),
    )
    assigner = dict(type='CenterRegionAssigner', pos_scale=0.5, neg_scale=0.8, min_pos_iof=0.01)
    return detector('FSAF', {**default, **head}, assigner, channels)


def fovea(channels: int = 8, **head: object) -> dict:
    """Return FoveaBox."""
    default = dict(
        type='FoveaHead',
        strides=STRIDES,
        base_edge_list=[16, 32, 64],
        scale_ranges=((1, 40), (20, 64), (32, 512)),
        sigma=0.6,
        loss_cls=FOCAL,
        loss_bbox=SMOOTH_L1,
        norm_cfg=GN,
    )
    return detector('FOVEA', {**default, **head}, None, channels)


def autoassign(channels: int = 8, **head: object) -> dict:
    """Return AutoAssign."""
    default = dict(
        type='AutoAssignHead',
        strides=STRIDES,
        regress_ranges=((-1, 24), (24, 48), (48, 1e8)),
        loss_bbox=dict(type='GIoULoss', loss_weight=5.0),
        norm_cfg=GN,
    )
    return detector('AutoAssign', {**default, **head}, None, channels)


def reppoints(channels: int = 8, **head: object) -> dict:
    """Return RepPoints."""
    default = dict(
        type='RepPointsHead',
        point_feat_channels=8,
        point_strides=STRIDES,
        loss_cls=FOCAL,
        norm_cfg=GN,
    )
    cfg = detector('RepPointsDetector', {**default, **head}, None, channels)
    rest = dict(allowed_border=-1, pos_weight=-1, debug=False)
    refine = dict(
        type='MaxIoUAssigner', pos_iou_thr=0.3, neg_iou_thr=0.2, min_pos_iou=0, ignore_iof_thr=-1
    )
    cfg['train_cfg'] = dict(
        init=dict(assigner=dict(type='PointAssigner', scale=4, pos_num=1), **rest),
        refine=dict(assigner=refine, **rest),
    )
    return cfg


def reppoints_minmax(channels: int = 8, **head: object) -> dict:
    """Return RepPoints whose boxes are the extremes of the points."""
    return reppoints(channels, transform_method='minmax', **head)


def sabl(channels: int = 8, **head: object) -> dict:
    """Return SABL-RetinaNet."""
    default = dict(
        type='SABLRetinaHead',
        approx_anchor_generator=APPROX,
        square_anchor_generator=SQUARE,
        loss_cls=FOCAL,
    )
    return detector('RetinaNet', {**default, **head}, APPROX_ASSIGNER, channels)


def guided(channels: int = 8, **head: object) -> dict:
    """Return RetinaNet with guided anchors."""
    default = dict(
        type='GARetinaHead',
        approx_anchor_generator=APPROX,
        square_anchor_generator=SQUARE,
        loss_cls=FOCAL,
        loss_bbox=SMOOTH_L1,
        loc_filter_thr=0.5,
    )
    assigner = dict(
        type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=0.5
    )
    cfg = detector('RetinaNet', {**default, **head}, assigner, channels)
    cfg['train_cfg'].update(
        ga_assigner={**APPROX_ASSIGNER, 'min_pos_iou': 0.4},
        ga_sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5),
        center_ratio=0.2,
        ignore_ratio=0.5,
    )
    return cfg


def centernet(channels: int = 8, **head: object) -> dict:
    """Return CenterNet of CenterNet2."""
    default = dict(
        type='CenterNetUpdateHead',
        strides=STRIDES,
        regress_ranges=((0, 40), (20, 64), (32, 1e8)),
        norm_cfg=GN,
    )
    return detector('CenterNet', {**default, **head}, None, channels)


SPLIT = dict(
    retina_sepbn=retina_sepbn,
    tood=tood,
    tood_initial=tood_initial,
    vfnet=vfnet,
    vfnet_plain=vfnet_plain,
    paa=paa,
    fovea=fovea,
    reppoints=reppoints,
    reppoints_minmax=reppoints_minmax,
    sabl=sabl,
)
"""Families whose own loss FIT splits."""
WHOLE = dict(
    pisa=pisa,
    free_anchor=free_anchor,
    ddod=ddod,
    fsaf=fsaf,
    autoassign=autoassign,
    guided=guided,
    centernet=centernet,
)
"""Families whose own loss FIT refuses."""
FAMILIES = {**SPLIT, **WHOLE}
VARIANTS = ('vfnet_plain', 'reppoints_minmax')
"""Families that differ from another one in the targets or the boxes only."""
