"""MaskFormer and Mask2Former of mmdet's model zoo, shrunk until they train in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.structures import PixelData
from torch import nn

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from tests import tiny_zoo

FORMERS = dict(
    maskformer='maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
    instance='mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    panoptic='mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
)
STUFF = dict(maskformer=2, instance=0, panoptic=2)
SIZES = {
    **tiny_zoo.SIZES,
    'feat_channels': 16,
    'out_channels': 16,
    'num_layers': 2,
    'num_points': 64,
    'num_things_classes': 3,
}


def config(name: str, queries: int = 12) -> dict:
    """Return one of them with a ResNet-18 of 8 channels."""
    cfg = resolve_model_cfg(f'mmdet::{FORMERS[name]}')
    cfg.data_preprocessor.batch_augments = None
    tiny_zoo._shrink(cfg, {**SIZES, 'num_stuff_classes': STUFF[name]})
    cfg.backbone.update(depth=18, init_cfg=None, norm_eval=True, base_channels=8, stem_channels=8)
    cfg.panoptic_head.update(in_channels=[8, 16, 32, 64], num_queries=queries)
    cfg.panoptic_head.loss_cls.class_weight = [1.0] * (3 + STUFF[name]) + [0.1]
    return {'_scope_': 'mmdet', **cfg}


def build(cfg: dict, seed: int) -> nn.Module:
    """Build one whose scores and masks differ from query to query."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.panoptic_head.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def batch(model: nn.Module, boxes: bool = True) -> tuple[torch.Tensor, list]:
    """Return the batch of :func:`tests.tiny_zoo.raw`, with two kinds of stuff around the things."""
    data = tiny_zoo.raw(boxes)
    for sample in data['data_samples']:
        height, width = sample.img_shape
        stuff = torch.full((1, height, width), 3)
        stuff[:, height // 2 :] = 4
        sample.gt_sem_seg = PixelData(sem_seg=stuff)
        if not model.panoptic_head.num_stuff_classes:
            del sample.gt_sem_seg
    data = model.data_preprocessor(data, training=True)
    return data['inputs'], data['data_samples']


def distil(
    folder: Path, cfg: dict, teacher: dict, losses: dict, seeds: tuple[int, int] = (0, 1)
) -> nn.Module:
    """Build a student in training mode, with a teacher."""
    path = folder / f'{seeds[1]}.pth'
    torch.save(dict(state_dict=build(teacher, seeds[1]).state_dict()), path)
    model = build_teacher_student(cfg, dict(model=teacher, checkpoint=str(path)), losses)
    model.distillation.start()  # the next model's teacher has the same file
    model.load_state_dict(build(cfg, seeds[0]).state_dict())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
