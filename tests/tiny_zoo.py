"""Two-stage detectors and DETRs of mmdet's model zoo, shrunk until they train in milliseconds."""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import PixelData
from torch import nn

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.fit import build_fit
from mmdistill_ext.distillers.teacher_student import DistilledModel, build_teacher_student
from tests import tiny_det

ZOO = dict(
    faster='faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    mask='mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    cascade='cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    detr='detr/detr_r50_8xb2-150e_coco.py',
    deformable='deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    two_stage='deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
    dino='dino/dino-4scale_r50_8xb2-12e_coco.py',
    conditional='conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    dab='dab_detr/dab-detr_r50_8xb2-50e_coco.py',
)
MORE = dict(
    ddq='ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
    sparse='sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    queryinst='queryinst/queryinst_r50_fpn_1x_coco.py',
    double='double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    dynamic='dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py',
    grid='grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py',
    pisa='pisa/mask-rcnn_r50_fpn_pisa_1x_coco.py',
    sabl='sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py',
    sabl_cascade='sabl/sabl-cascade-rcnn_r50_fpn_1x_coco.py',
    seesaw='seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py',
    scoring='ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py',
    pointrend='point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
    panoptic='panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    htc_plain='htc/htc-without-semantic_r50_fpn_1x_coco.py',
    htc='htc/htc_r50_fpn_1x_coco.py',
    scnet='scnet/scnet_r50_fpn_1x_coco.py',
    crowd='crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py',
)
ROI = ('faster', 'mask', 'cascade')
QUERY = ('detr', 'deformable', 'two_stage', 'dino')
SIZES = dict(
    in_channels=8,
    out_channels=8,
    feat_channels=8,
    conv_out_channels=8,
    fc_out_channels=16,
    embed_dims=16,
    feedforward_channels=16,
    num_feats=8,
    num_heads=2,
    num_convs=1,
    dropout=0.0,
    ffn_drop=0.0,
    num_classes=3,
    num_queries=12,
    num=24,
    nms_pre=40,
    max_per_img=20,
    num_groups=2,
    frozen_stages=-1,
    base_channels=8,
    stem_channels=8,
    cls_in_channels=8,
    reg_in_channels=8,
    cls_out_channels=16,
    reg_cls_out_channels=8,
    reg_offset_out_channels=8,
    proposal_feature_channel=8,
    num_proposals=12,
    num_things_classes=3,
    num_stuff_classes=2,
    out_conv_channels=8,
    inner_channels=8,
)


def config(name: str, **changes: object) -> dict:
    """Return one of them with ResNet-18s of 8 channels; ``changes`` go to its top level."""
    cfg = resolve_model_cfg(f'mmdet::{(ZOO | MORE)[name]}')
    # in mmdet's code (DINO's up to 3.3)
    fixed = name in ('two_stage', 'dino', 'ddq', 'conditional')
    width = dict(embed_dims=256, num_feats=128) if fixed else {}
    if name == 'ddq':  # as many as in its encoder, where mmdet's default stands
        width['num_heads'] = 8
    _shrink(cfg, {**SIZES, **width})
    cfg.backbone.update(depth=18, init_cfg=None, norm_eval=True, base_channels=8, stem_channels=8)
    cfg.data_preprocessor.pop('batch_augments', None)
    stages = cfg.backbone.out_indices
    cfg.neck.in_channels = [8 * 2**stage for stage in stages]
    for part in ('encoder', 'decoder'):
        if part in cfg:
            cfg[part].num_layers = 2
            cfg.neck.out_channels = cfg.bbox_head.embed_dims = 2 * cfg.positional_encoding.num_feats
    if 'rpn_head' in cfg and cfg.rpn_head.type == 'EmbeddingRPNHead':
        _cut_stages(cfg, 2)
    if 'feat_relay_head' in cfg.get('roi_head', {}):
        cfg.roi_head.feat_relay_head.in_channels = SIZES['fc_out_channels']
    if 'dn_cfg' in cfg:
        cfg.dn_cfg.group_cfg = dict(dynamic=True, num_groups=None, num_dn_queries=4)
    cfg.update(changes)
    return cfg


def _cut_stages(cfg: dict, count: int) -> None:
    """Leave the first stages of a cascade."""
    head = cfg.roi_head
    head.num_stages = count
    for part in ('stage_loss_weights', 'bbox_head', 'mask_head'):
        if isinstance(head.get(part), list):
            head[part] = head[part][:count]
    cfg.train_cfg.rcnn = cfg.train_cfg.rcnn[:count]


def _shrink(cfg: object, sizes: dict) -> None:
    if isinstance(cfg, list):
        for part in cfg:
            _shrink(part, sizes)
    if not isinstance(cfg, dict):
        return
    for key, value in cfg.items():
        if key in sizes and isinstance(value, int | float):
            cfg[key] = sizes[key]
        _shrink(value, sizes)


def build(cfg: dict, seed: int) -> nn.Module:
    """Build one whose scores and boxes differ from unit to unit."""
    torch.manual_seed(seed)
    model = build_model({'_scope_': 'mmdet', **cfg})
    vary(model)
    return model


def vary(model: nn.Module) -> None:
    """Draw the weights of what predicts wide enough for varied predictions."""
    heads = [getattr(model, name) for name in ('bbox_head', 'roi_head') if hasattr(model, name)]
    set_level_embed(model)
    if hasattr(getattr(model, 'rpn_head', None), 'init_proposal_bboxes'):
        model.rpn_head.init_weights()  # boxes of the size of the image
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)


def set_level_embed(model: nn.Module) -> None:
    """Draw what mmdet's DETRs leave as memory happened to be, until `init_weights`."""
    if hasattr(model, 'level_embed'):
        nn.init.normal_(model.level_embed)


def calm(model: nn.Module) -> nn.Module:
    """Weaken heads: boxes stay near their RoIs or the middle, no score is near 0 or 1."""
    weak = {'shared_fcs': 0.3, 'roi_head.bbox_head': 0.5, 'reg_branches': 0.5, 'fc_reg': 0.3}
    branches = getattr(getattr(model, 'bbox_head', None), 'cls_branches', None)
    if branches is not None and branches[0].in_features > 100:
        weak.update(cls_branches=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, factor in weak.items():
                if part in name and parameter.ndim > 1:
                    parameter.mul_(factor)
    return model


def save_weights(path, cfg: dict, seed: int) -> str:
    """Save such a detector as a checkpoint."""
    meta = dict(dataset_meta=dict(classes=tiny_det.CLASSES))
    torch.save(dict(state_dict=build(cfg, seed).state_dict(), meta=meta), path)
    return str(path)


def raw(boxes: bool = True) -> dict:
    """Return the batch of :func:`tests.tiny_det.raw`, with a mask in every box, and segments."""
    return add_masks(tiny_det.raw(boxes))


def add_masks(data: dict) -> dict:
    """Put an elliptic mask into every box of a raw batch, and segments."""
    for sample in data['data_samples']:
        height, width = sample.img_shape
        masks = [_ellipse(box, height, width) for box in sample.gt_instances.bboxes.tolist()]
        masks = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
        sample.gt_instances.masks = BitmapMasks(masks, height, width)
        count = len(sample.ignored_instances.bboxes)
        sample.ignored_instances.masks = BitmapMasks(
            np.zeros((count, height, width), np.uint8), height, width
        )
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        sample.gt_sem_seg = PixelData(sem_seg=((rows // 8 + columns // 8) % 3)[None])
    return data


def _ellipse(box: list[float], height: int, width: int) -> np.ndarray:
    left, top, right, bottom = box
    rows, columns = np.mgrid[:height, :width]
    x = (columns + 0.5 - (left + right) / 2) / (right - left)
    y = (rows + 0.5 - (top + bottom) / 2) / (bottom - top)
    return (x**2 + y**2 < 0.25).astype(np.uint8)


def batch(model: nn.Module, boxes: bool = True) -> tuple[torch.Tensor, list]:
    """Return the batch as it leaves the model's preprocessor."""
    data = model.data_preprocessor(raw(boxes), training=True)
    return data['inputs'], data['data_samples']


def crowd(model: nn.Module) -> tuple[torch.Tensor, list]:
    """Return the batch with more and larger objects, five and none and three; no masks."""
    data = tiny_det.raw()
    truth = (
        [[6, 8, 70, 54], [20, 10, 84, 50], [4, 4, 60, 50], [30, 20, 60, 50], [2, 2, 20, 20]],
        [],
        [[4, 4, 50, 36], [10, 6, 44, 36], [8, 8, 48, 38]],
    )
    for sample, boxes in zip(data['data_samples'], truth, strict=True):
        found = tiny_det.sample(sample.img_shape, boxes, [0, 2, 1, 1, 0][: len(boxes)], [])
        sample.gt_instances = found.gt_instances
    data = model.data_preprocessor(data, training=True)
    return data['inputs'], data['data_samples']


def distil(
    folder: Path,
    name: dict | str,
    losses: dict,
    teacher: dict | str | None = None,
    fit: dict | None = None,
    seeds: tuple[int, int] = (12, 11),
    **changes: object,
) -> nn.Module:
    """Build a student in training mode and its teacher, both calm; no layer drops anything.

    Args:
        folder: Where the teacher is saved.
        name: Name or config of the student.
        losses: The distiller's.
        teacher: Name or config of the teacher; as the student when not given.
        fit: The distiller's.
        seeds: Of student and teacher.
        changes: To the student's config.
    """
    cfg = config(name, **changes) if isinstance(name, str) else name
    teacher = config(teacher or name) if isinstance(teacher, str | None) else teacher
    path = folder / 'teacher.pth'
    meta = dict(dataset_meta=dict(classes=tiny_det.CLASSES))
    torch.save(dict(state_dict=calm(build(teacher, seeds[1])).state_dict(), meta=meta), path)
    parts = {'_scope_': 'mmdet', **cfg}, {'_scope_': 'mmdet', **teacher}
    model = build_teacher_student(
        parts[0], dict(model=parts[1], checkpoint=str(path)), losses, fit=fit
    )
    model.distillation.start()  # the next model's teacher has the same file
    model.load_state_dict(calm(build(cfg, seeds[0])).state_dict())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of a distilled student without its teacher."""
    forget(model)
    student = copy.deepcopy(model)
    student.__class__ = type(model).__mro__[2]
    assert not isinstance(student, DistilledModel)
    del student.distillation
    return student


def forget(model: nn.Module) -> None:
    """Drop what mmdet's heads keep of a step for their masks: it has a graph, so no copy."""
    getattr(getattr(model, 'bbox_head', None), '_raw_positive_infos', {}).clear()


def set_fit(model: nn.Module, by: str | None, c: float, **rule: object) -> nn.Module:
    """Let the model split its losses by the teacher, with F(x) = ``c``; None for not at all."""
    model.distillation.fit = None
    if by is not None:
        model.distillation.fit = build_fit(
            dict(function=dict(type='ConstantFit', c=c), split=by, **rule)
        )
        model.distillation.fit.has_hook = True
    return model


class Step(NamedTuple):
    """What came out of one step."""

    losses: dict
    logged: dict
    gradients: dict
    units: list


def step(model: nn.Module, data: tuple, seed: int = 5) -> Step:
    """One step of a detector on a batch; what samplers and denoising draw is given by the seed."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    units, hooks = [], []
    for term in model.distillation.terms if hasattr(model, 'distillation') else ():
        hooks.append(term.loss.register_forward_pre_hook(lambda _, args: units.append(args[0])))
    losses = model(data[0], copy.deepcopy(data[1]), mode='loss')
    total, logged = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(losses, {k: v.item() for k, v in logged.items()}, gradients, units)


def in_one(logits: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Logits of units as ``(B, C, ...)``: levels ``(B, A, C, n)`` by level, location, prior."""
    if isinstance(logits, torch.Tensor):
        return logits
    return torch.cat([x.permute(0, 2, 3, 1).flatten(2) for x in logits], 2)


def reference(units, selective: bool, joint: bool = False) -> dict[str, object]:
    """Sums of classes' and boxes' distances by the definition, unit by unit, in float64."""
    classes, boxes, wins = 0.0, 0.0, torch.zeros(units.labels.shape, dtype=torch.bool)
    index = (
        () if units.boxes is None else zip(*(x.tolist() for x in units.boxes.index), strict=True)
    )
    place = {at: i for i, at in enumerate(index)}
    taught = units.labels != -1
    for at in [*taught.nonzero().tolist(), *(list(at) for at in place if not taught[at])]:
        label = int(units.labels[tuple(at)])  # -1: its box alone is trained
        student, teacher = (
            logits.detach().double()[(at[0], slice(None), *at[1:])]
            for logits in (in_one(units.student), in_one(units.teacher))
        )
        if units.sigmoid:
            truth = torch.zeros_like(student)
            if len(student) == 1:
                truth[0] = label
            elif label < len(student):
                truth[label] = 1
            first, second = (
                -(truth * F.logsigmoid(x) + (1 - truth) * F.logsigmoid(-x)).sum()
                for x in (teacher, student)
            )
            p = teacher.sigmoid()
            distance = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
            distance = distance + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        else:
            first, second = (-x.log_softmax(0)[label] for x in (teacher, student))
            distance = teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))
        box = place.get(tuple(at))
        if box is not None:
            found = units.boxes
            own, other, target = (
                x[box].detach().tolist() for x in (found.student, found.teacher, found.target)
            )
            own_iou, other_iou = overlap(own, target)[0], overlap(other, target)[0]
            if joint:
                first, second = first + 1 - other_iou, second + 1 - own_iou
        won = bool(first < second) and label != -1
        wins[tuple(at)] = won
        if (won or not selective) and label != -1:
            classes += distance.sum().item()
        if box is not None:
            chosen = won if joint else other_iou > own_iou
            if (chosen or not selective) and min(other[2] - other[0], other[3] - other[1]) >= 1:
                boxes += 1 - overlap(own, other)[1]
    return dict(classes=classes, boxes=boxes, wins=wins)


def overlap(first: list[float], second: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two boxes."""
    areas = [(max(b[2] - b[0], 0)) * (max(b[3] - b[1], 0)) for b in (first, second)]
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(width, 0) * max(height, 0)
    union = max(sum(areas) - common, 1e-6)
    hull = (max(first[2], second[2]) - min(first[0], second[0])) * (
        max(first[3], second[3]) - min(first[1], second[1])
    )
    return common / union, common / union - (hull - union) / max(hull, 1e-6)


def in_a_crowd(box: list[float], sample, iou: float) -> bool:
    """Whether so much of a box lies in one of the ignored ones."""
    area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    for left, top, right, bottom in sample.ignored_instances.bboxes.tolist():
        width, height = (
            min(box[2], right) - max(box[0], left),
            min(box[3], bottom) - max(box[1], top),
        )
        if max(width, 0) * max(height, 0) >= iou * max(area, 1e-6):
            return True
    return False
