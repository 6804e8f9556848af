"""Single-stage detectors and instance segmenters with other heads than those of tiny_det."""

from pathlib import Path

import numpy as np
import torch
from mmdet.models.necks import FPN
from mmdet.registry import MODELS as MMDET
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from tests import tiny_det, tiny_zoo
from tests.tiny_det import DELTAS, FOCAL, GIOU, GN, POINTS, QFL, STRIDES

DICE = dict(type='DiceLoss', use_sigmoid=True, activate=True, eps=5e-6, loss_weight=1.0)
MAX_IOU = dict(
    type='MaxIoUAssigner',
    pos_iou_thr=0.4,
    neg_iou_thr=0.3,
    min_pos_iou=0.0,
    ignore_iof_thr=-1,
    gt_max_assign_all=False,
)
THREE = dict(type='AnchorGenerator', ratios=[0.5, 1.0, 2.0], scales=[4], strides=STRIDES)


@MMDET.register_module()
class FinestTwice(FPN):
    """The finest level, twice, as two stacked networks give it."""

    def forward(self, inputs: tuple) -> tuple:
        """Two maps ``(B, C, H, W)``."""
        return super().forward(inputs)[:1] * 2


def detector(kind: str, channels: int, train_cfg: dict | None, **heads: dict) -> dict:
    """Return ResNet-18 with an FPN of three levels and these heads."""
    cfg = tiny_det.detector(kind, {}, None, channels)
    del cfg['bbox_head']
    if train_cfg is not None:
        train_cfg = dict(allowed_border=-1, pos_weight=-1, debug=False, **train_cfg)
    return {**cfg, **heads, 'train_cfg': train_cfg}


def with_masks(cfg: dict) -> dict:
    """Let the preprocessor pad masks as it pads images."""
    cfg['data_preprocessor']['pad_mask'] = True
    return cfg


def ssd(channels: int = 8, kind: str = 'SSDHead', **train_cfg: object) -> dict:
    """Return SSD with four, six and four anchors per location."""
    head = dict(
        type=kind,
        in_channels=(8, 8, 8),
        num_classes=3,
        anchor_generator=dict(
            type='SSDAnchorGenerator',
            scale_major=False,
            strides=STRIDES,
            ratios=[[2], [2, 3], [2]],
            min_sizes=[16, 32, 48],
            max_sizes=[32, 48, 64],
        ),
        bbox_coder=DELTAS,
    )
    train = dict(assigner=MAX_IOU, smoothl1_beta=1.0, neg_pos_ratio=3, **train_cfg)
    return detector('SingleStageDetector', channels, train, bbox_head=head)


def pisa(channels: int = 8) -> dict:
    """Return SSD with PISA."""
    return ssd(channels, 'PISASSDHead', isr=dict(k=2.0, bias=0.0), carl=dict(k=1, bias=0.2))


def yolof(channels: int = 8) -> dict:
    """Return YOLOF on the level of stride 16; a second one of the FPN is not used."""
    head = dict(
        type='YOLOFHead',
        num_classes=3,
        in_channels=8,
        num_cls_convs=1,
        num_reg_convs=1,
        reg_decoded_bbox=True,
        norm_cfg=GN,
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[1, 2, 4], strides=[16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', add_ctr_clamp=True, ctr_clamp=16),
        loss_cls=FOCAL,
        loss_bbox=GIOU,
    )
    assigner = dict(type='UniformAssigner', pos_ignore_thr=0.15, neg_ignore_thr=0.7)
    cfg = detector('YOLOF', channels, dict(assigner=assigner), bbox_head=head)
    cfg['neck'].update(start_level=2, end_level=2, num_outs=1)
    return cfg


def yolov3(channels: int = 8) -> dict:
    """Return YOLOv3, whose first level is the coarsest."""
    bce = dict(type='CrossEntropyLoss', use_sigmoid=True, reduction='sum')
    head = dict(
        type='YOLOV3Head',
        num_classes=3,
        in_channels=[8, 8, 8],
        out_channels=[8, 8, 8],
        norm_cfg=GN,
        anchor_generator=dict(
            type='YOLOAnchorGenerator',
            base_sizes=[
                [(48, 40), (64, 48), (80, 64)],
                [(24, 20), (32, 32), (40, 36)],
                [(10, 13), (16, 16), (20, 24)],
            ],
            strides=STRIDES[::-1],
        ),
        bbox_coder=dict(type='YOLOBBoxCoder'),
        featmap_strides=STRIDES[::-1],
        loss_cls=bce,
        loss_conf=bce,
        loss_xy=dict(bce, loss_weight=2.0),
        loss_wh=dict(type='MSELoss', loss_weight=2.0, reduction='sum'),
    )
    assigner = dict(type='GridAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0)
    cfg = detector('YOLOV3', channels, dict(assigner=assigner), bbox_head=head)
    cfg['backbone']['out_indices'] = (1, 2, 3)
    width = [channels * 2**i for i in (3, 2, 1)]
    cfg['neck'] = dict(
        type='YOLOV3Neck', num_scales=3, in_channels=width, out_channels=[8, 8, 8], norm_cfg=GN
    )
    return cfg


def centernet(channels: int = 8) -> dict:
    """Return CenterNet on the level of stride 4."""
    head = dict(type='CenterNetHead', num_classes=3, in_channels=8, feat_channels=8)
    cfg = detector('CenterNet', channels, None, bbox_head=head)
    cfg['neck'].update(start_level=0, end_level=0, num_outs=1)
    return cfg


def cornernet(channels: int = 8, kind: str = 'CornerHead', **head: object) -> dict:
    """Return CornerNet on the level of stride 4, twice, as from two stacked networks."""
    focal = dict(type='GaussianFocalLoss', alpha=2.0, gamma=4.0, loss_weight=1)
    default = dict(
        type=kind,
        num_classes=3,
        in_channels=8,
        num_feat_levels=2,
        corner_emb_channels=1,
        loss_heatmap=focal,
        loss_offset=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1),
    )
    cfg = detector('CornerNet', channels, None, bbox_head={**default, **head})
    cfg['neck'].update(type='FinestTwice', start_level=0, num_outs=4)
    return cfg


def centripetal(channels: int = 8) -> dict:
    """Return CentripetalNet."""
    shift = dict(type='SmoothL1Loss', beta=1.0, loss_weight=0.05)
    losses = dict(loss_guiding_shift=shift, loss_centripetal_shift=shift)
    return cornernet(channels, 'CentripetalHead', corner_emb_channels=0, **losses)


def rtmdet_ins(channels: int = 8) -> dict:
    """Return RTMDet-Ins' usual head."""
    head = dict(
        type='RTMDetInsSepBNHead',
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        norm_cfg=GN,
        anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
        bbox_coder=POINTS,
        loss_cls=QFL,
        loss_bbox=GIOU,
        loss_mask=dict(type='DiceLoss', loss_weight=2.0, eps=5e-6),
    )
    assigner = dict(type='DynamicSoftLabelAssigner', topk=5)
    return with_masks(detector('RTMDet', channels, dict(assigner=assigner), bbox_head=head))


def condinst(channels: int = 8, kind: str = 'CondInst', **mask_head: object) -> dict:
    """Return CondInst."""
    box = dict(
        type=f'{kind}BboxHead',
        num_params=169,
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        strides=STRIDES,
        regress_ranges=((-1, 24), (24, 48), (48, 1e8)),
        norm_on_bbox=True,
        center_sampling=True,
        centerness_on_reg=True,
        loss_cls=FOCAL,
        loss_bbox=GIOU,
        norm_cfg=GN,
    )
    features = dict(
        in_channels=8,
        feat_channels=8,
        start_level=0,
        end_level=2,
        out_channels=8,
        mask_stride=8,
        num_stacked_convs=1,
        norm_cfg=GN,
    )
    mask = dict(
        type=f'{kind}MaskHead',
        num_layers=3,
        feat_channels=8,
        size_of_interest=8,
        mask_out_stride=4,
        mask_feature_head=features,
        loss_mask=DICE,
        **{'max_masks_to_train': 300, **mask_head},
    )
    return with_masks(detector(kind, channels, None, bbox_head=box, mask_head=mask))


def boxinst(channels: int = 8) -> dict:
    """Return BoxInst, whose masks are learnt from boxes and colours."""
    cfg = condinst(channels, 'BoxInst', max_masks_to_train=-1, topk_masks_per_img=64)
    return cfg


def yolact(channels: int = 8) -> dict:
    """Return YOLACT."""
    box = dict(
        type='YOLACTHead',
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        num_protos=4,
        anchor_generator=dict(THREE, strides=[8.2, 16.1, 32.3]),
        bbox_coder=DELTAS,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, reduction='none'),
        loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.5),
    )
    mask = dict(
        type='YOLACTProtonet',
        in_channels=8,
        num_protos=4,
        proto_channels=(8, None, 4),
        proto_kernel_sizes=(3, -2, 1),
        num_classes=3,
        max_masks_to_train=100,
        loss_mask_weight=6.125,
    )
    train = dict(assigner=MAX_IOU, sampler=dict(type='PseudoSampler'), neg_pos_ratio=3)
    return with_masks(detector('YOLACT', channels, train, bbox_head=box, mask_head=mask))


def solo(channels: int = 8, kind: str = 'SOLOHead', model: str = 'SOLO', **head: object) -> dict:
    """Return SOLO with four grids."""
    mask = dict(
        type=kind,
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        stacked_convs=2,
        strides=[8, 8, 16, 32],
        scale_ranges=((1, 24), (16, 40), (30, 48), (40, 2048)),
        pos_scale=0.5,
        num_grids=[10, 8, 6, 5],
        cls_down_index=0,
        loss_mask=dict(type='DiceLoss', use_sigmoid=True, loss_weight=3.0),
        loss_cls=FOCAL,
        norm_cfg=GN,
    )
    cfg = detector(model, channels, None, mask_head={**mask, **head})
    cfg['neck'].update(start_level=0, num_outs=4)
    return with_masks(cfg)


def decoupled(channels: int = 8, kind: str = 'DecoupledSOLOHead') -> dict:
    """Return SOLO with masks that are products of two."""
    loss = dict(type='DiceLoss', use_sigmoid=True, activate=False, loss_weight=3.0)
    return solo(channels, kind, loss_mask=loss)


def decoupled_light(channels: int = 8) -> dict:
    """Return the smaller one of these."""
    return decoupled(channels, 'DecoupledSOLOLightHead')


def solov2(channels: int = 8) -> dict:
    """Return SOLOv2."""
    features = dict(
        feat_channels=8, start_level=0, end_level=2, out_channels=8, mask_stride=4, norm_cfg=GN
    )
    return solo(channels, 'SOLOV2Head', 'SOLOv2', mask_feature_head=features)


HEADS = dict(
    ssd=ssd,
    pisa=pisa,
    yolof=yolof,
    yolov3=yolov3,
    centernet=centernet,
    cornernet=cornernet,
    centripetal=centripetal,
    rtmdet_ins=rtmdet_ins,
    condinst=condinst,
    boxinst=boxinst,
    yolact=yolact,
    solo=solo,
    decoupled=decoupled,
    decoupled_light=decoupled_light,
    solov2=solov2,
)


MASKED = ('solo', 'decoupled', 'decoupled_light', 'solov2')
"""Their head is the mask head."""
WITHOUT_BOXES = ('cornernet', 'centripetal', 'solo', 'decoupled', 'decoupled_light', 'solov2')
ONE_SIZE = ('PISASSDHead', 'YOLACTHead')


def build(cfg: dict, seed: int) -> nn.Module:
    """Build one whose scores and boxes differ from place to place."""
    torch.manual_seed(seed)
    model = build_model({'_scope_': 'mmdet', **cfg})
    heads = [getattr(model, name, None) for name in ('bbox_head', 'mask_head')]
    with torch.no_grad():
        for head in filter(None, heads):
            for parameter in head.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.1)
    return model


def batch(model: nn.Module, boxes: bool = True) -> tuple[torch.Tensor, list]:
    """Return the batch of :func:`tests.tiny_zoo.raw` as it leaves the model's preprocessor.

    For heads that take images of one size only, as large as the batch, the labels stay.
    """
    inputs, samples = tiny_zoo.batch(model, boxes)
    if type(getattr(model, 'bbox_head', None)).__name__ in ONE_SIZE:
        for sample in samples:
            size = tuple(inputs.shape[2:])
            sample.set_metainfo(dict(img_shape=size, pad_shape=size))
    if type(model).__name__.endswith('BoxInst'):
        for sample in samples:
            _boxes_as_masks(sample.gt_instances, *inputs.shape[2:])
    return inputs, samples


def _boxes_as_masks(instances: InstanceData, height: int, width: int) -> None:
    """As BoxInst's preprocessor, with neighbours alike at random; it needs scikit-image."""
    masks = np.zeros((len(instances), height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, instances.bboxes.int(), strict=True):
        mask[top:bottom, left:right] = 1
    instances.masks = BitmapMasks(masks, height, width)
    generator = torch.Generator().manual_seed(0)
    alike = torch.rand(len(instances), 8, height // 4, width // 4, generator=generator)
    instances.pairwise_masks = (alike < 0.5).float()


def train(model: nn.Module) -> nn.Module:
    """Put a model into training mode, but not the BNs that CornerNet's head cannot do without."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def save_weights(folder: Path, cfg: dict, seed: int) -> str:
    """Save such a detector as a checkpoint."""
    path = folder / f'{cfg["type"]}{seed}.pth'
    meta = dict(dataset_meta=dict(classes=tiny_det.CLASSES))
    torch.save(dict(state_dict=build(cfg, seed).state_dict(), meta=meta), path)
    return str(path)


def distil(
    folder: Path, cfg: dict, teacher: dict, losses: dict, seeds: tuple[int, int] = (0, 1)
) -> nn.Module:
    """Build a student in training mode, with a teacher."""
    path = save_weights(folder, teacher, seeds[1])
    model = build_teacher_student(cfg, dict(model=teacher, checkpoint=path), losses)
    model.distillation.start()  # the next model's teacher has the same file
    model.load_state_dict(build(cfg, seeds[0]).state_dict())
    MessageHub.get_current_instance().update_info('iter', 0)  # BoxInst asks for it
    return train(model)
