"""Fourteen valid configs, one per way to use this package, each of which trains in a second."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config

from tests import tiny_bccd, tiny_collaboration, tiny_det, tiny_seg

HOOK = 'mmdistill_ext.{}'.format
SEG_HOOKS = (
    dict(type=HOOK('StartCheckHook'), check_labels=2, check_teacher=True, floor=dict(mIoU=0.0)),
    dict(type=HOOK('TeacherShareHook'), interval=1, per_class=True),
    dict(type=HOOK('ContrastMaskHook'), interval=1, max_images=1, alpha=0.5, losses=['sel']),
)
DET_HOOKS = (
    dict(type=HOOK('StartCheckHook'), check_labels=2),
    dict(type=HOOK('TeacherShareHook'), interval=1),
    dict(type=HOOK('BoxComparisonHook'), interval=1, max_images=1, score_thr=0.3),
)
FIT_HOOK = dict(type=HOOK('FitHook'), interval=1, batches=2, window=2, begin=0, check_labels=2)
BOX = dict(weight=1.0, distance='iou')
CONV = dict(type='Conv1x1', bias=True)
TIMES = dict(weight=1.0, begin=0, warmup=2, stop=2)
LAZY = dict(
    TeacherStudentDistiller='mmdistill_ext.distillers.teacher_student',
    KDLoss='mmdistill_ext.losses',
    SelectiveLoss='mmdistill_ext.losses',
    ConstantFit='mmdistill_ext.policies.fit_functions',
    StartCheckHook='mmdistill_ext.hooks',
    FitHook='mmdistill_ext.hooks',
)
LAZY_NAMES = dict(TeacherStudentDistiller='build_teacher_student')


class Folder:
    """Data and teachers of all configs, written once.

    Args:
        path: An empty folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for split in ('train', 'val'):
            tiny_seg.write_data(path / 'seg', split)
            tiny_bccd.write_coco(path / 'det', split)
        self.seg_teacher = tiny_seg.save_weights(path / 'seg.pth', tiny_seg.model(16), 1)
        self.det_teachers = {
            name: tiny_det.save_weights(path / f'{name}.pth', tiny_det.FAMILIES[name](12), 1)
            for name in ('retina', 'gfl')
        }

    def seg(self) -> Config:
        """A plain segmenter: two iterations and a validation."""
        cfg = tiny_seg.config(self.path / 'seg', self.path / 'work')
        cfg.default_hooks.pop('visualization')
        cfg.default_hooks.checkpoint.save_best = 'mIoU'
        cfg.custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
        return cfg

    def det(self) -> Config:
        """A plain detector: two iterations and a validation."""
        name = 'plain/gfl_r18-w16_8e_bccd-320x240.py'
        cfg = tiny_bccd.config(self.path / 'det', name, self.path / 'work')
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
        cfg.param_scheduler = []
        cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP'
        cfg.custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
        return cfg


def _distil_seg(folder: Folder, losses: dict, hooks: tuple = (), **more: object) -> Config:
    cfg = folder.seg()
    cfg.model = dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=cfg.model,
        teacher=dict(model=tiny_seg.model(16), checkpoint=folder.seg_teacher),
        losses=losses,
        **more,
    )
    cfg.custom_hooks = list(hooks)
    return cfg


def _distil_det(folder: Folder, name: str, losses: dict, hooks: tuple, **more: object) -> Config:
    cfg = folder.det()
    cfg.model = dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=tiny_det.FAMILIES[name](8),
        teacher=dict(model=tiny_det.FAMILIES[name](12), checkpoint=folder.det_teachers[name]),
        losses=losses,
        **more,
    )
    for model in (cfg.model.student, cfg.model.teacher.model):
        model.test_cfg.max_per_img = 20
    cfg.custom_hooks = list(hooks)
    return cfg


def selective(folder: Folder) -> Config:
    """SEL of segmenters, with every hook that goes with it."""
    loss = dict(type='SelectiveLoss', temperature=2.0, distance='kl', average='selected', **TIMES)
    return _distil_seg(folder, dict(sel=loss), SEG_HOOKS, fuse_task_loss=False)


def plain_distillation(folder: Folder) -> Config:
    """KD of segmenters, with heads named and the own loss fused."""
    loss = dict(type='KDLoss', temperature=2.0, class_weight=[1.0, 2.0, 1.0], standardize=False)
    heads = dict(head='decode_head', teacher_head='decode_head')
    cfg = _distil_seg(folder, dict(kd=dict(loss, **heads)), SEG_HOOKS[:1], fuse_task_loss=True)
    cfg.model.teacher.update(patch_size=None, compile=False, channels_last=False)
    return cfg


def decoupled(folder: Folder) -> Config:
    """DKD of segmenters beside SEL."""
    loss = dict(type='DKDLoss', alpha=1.0, beta=0.5, temperature=2.0, average='valid')
    sel = dict(type='SelectiveLoss', difference='ce', weight=0.5)
    return _distil_seg(folder, dict(dkd=dict(loss, **TIMES), sel=sel), SEG_HOOKS[1:2])


def fit(folder: Folder) -> Config:
    """FIT of segmenters, by image."""
    loss = dict(type='SelectiveLoss', temperature=2.0)
    rule = dict(function=dict(type='ExponentialFit', b=10.0, f_max=2.0), split='image')
    return _distil_seg(folder, dict(sel=loss), (FIT_HOOK,), fit=dict(rule, threshold=0.9))


def features(folder: Folder) -> Config:
    """CWD of segmenters' features and logits."""
    stage = dict(type='CWDLoss', tap='backbone.3', teacher_tap='backbone.3', connector=CONV)
    logits = dict(type='CWDLoss', tap='decode_head', weight_by='labels', grid='student')
    losses = dict(stage=dict(stage, temperature=4.0, **TIMES), logits=dict(logits, weight=3.0))
    return _distil_seg(folder, losses, SEG_HOOKS[:1])


def _collaborate(folder: Folder, second: dict, **more: object) -> Config:
    cfg = tiny_collaboration.collaborate(folder.seg(), second)
    cfg.model.update(more)
    cfg.default_hooks.checkpoint.save_best = 'a/mIoU'
    return cfg


def collaborative(folder: Folder) -> Config:
    """COL of segmenters with views and an optimizer for each."""
    kl = dict(temperature=2.0, **TIMES)
    second = dict(type='MinLoss', per='unit')
    cfg = _collaborate(folder, second, kl=kl, second_weight=1.0, sequential_backward=False)
    cfg.optim_wrapper = tiny_collaboration.PER_NETWORK
    views = copy.deepcopy(tiny_collaboration.VIEWS)
    tiny_collaboration.add_views(cfg.train_dataloader.dataset.pipeline, views)
    return cfg


def validation_weighted(folder: Folder) -> Config:
    """COL whose weights come from a metric."""
    cfg = _collaborate(folder, dict(type='ValidationWeighted', metric='mIoU', temperature=5.0))
    cfg.custom_hooks[0].metric = 'mIoU'
    return cfg


def general(folder: Folder) -> Config:
    """COL whose weights come from the errors."""
    return _collaborate(folder, dict(type='General', ridge=1e-3))


def selective_boxes(folder: Folder) -> Config:
    """SEL of detectors, classes and boxes."""
    loss = dict(type='SelectiveLoss', average='positive', together=True, box=BOX, **TIMES)
    return _distil_det(folder, 'retina', dict(sel=loss), DET_HOOKS)


def plain_boxes(folder: Folder) -> Config:
    """KD of detectors, classes and distributions."""
    box = dict(weight=0.5, distance='distribution', temperature=2.0)
    loss = dict(type='KDLoss', average='positive', box=box, temperature=1.0)
    return _distil_det(folder, 'gfl', dict(kd=loss), DET_HOOKS[1:])


def fit_boxes(folder: Folder) -> Config:
    """FIT of detectors, by unit."""
    loss = dict(type='KDLoss', average='positive')
    rule = dict(function=dict(type='LogisticFit', b=10.0), split='unit', iou=0.5, score=0.3)
    return _distil_det(folder, 'retina', dict(kd=loss), (FIT_HOOK,), fit=rule)


def feature_boxes(folder: Folder) -> Config:
    """Features of detectors, at the teacher's scores."""
    loss = dict(type='FeatureLoss', distance='mse', tap='neck', connector=[CONV], grid='teacher')
    losses = dict(neck=dict(loss, weight_by='teacher_score', **TIMES))
    return _distil_det(folder, 'retina', losses, DET_HOOKS[:1])


def collaborative_boxes(folder: Folder) -> Config:
    """COL of detectors, classes and boxes."""
    cfg = folder.det()
    students = dict(a=tiny_det.atss(4), b=tiny_det.gfl(6))
    cfg = tiny_collaboration.collaborate(cfg, dict(type='MinLogit', shift=False), None, **students)
    cfg.model.update(box=dict(weight=1.0, distance='iou'), second_weight=0.5)
    cfg.default_hooks.checkpoint.save_best = 'ensemble/coco/bbox_mAP'
    return cfg


def lazy(folder: Folder) -> Config:
    """A lazy config: objects of this package in place of their names."""
    losses = dict(
        kd=dict(type='KDLoss', temperature=2.0, head='decode_head'),
        sel=dict(type='SelectiveLoss', weight=0.5, stop=2),
    )
    rule = dict(function=dict(type='ConstantFit', c=1.0))
    cfg = _distil_seg(folder, losses, (dict(SEG_HOOKS[0]), FIT_HOOK), fit=rule)
    text = cfg.pretty_text
    for name, module in LAZY.items():
        text = re.sub(rf"'(mmdistill_ext\.)?{name}'", LAZY_NAMES.get(name, name), text)
        text = f'from {module} import {LAZY_NAMES.get(name, name)}\n{text}'
    path = folder.path / 'lazy.py'
    path.write_text(text)
    return Config.fromfile(path, lazy_import=True)


CONFIGS: tuple[Callable[[Folder], Config], ...] = (
    selective,
    plain_distillation,
    decoupled,
    fit,
    features,
    collaborative,
    validation_weighted,
    general,
    selective_boxes,
    plain_boxes,
    fit_boxes,
    feature_boxes,
    collaborative_boxes,
    lazy,
)
