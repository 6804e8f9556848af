"""Runs of networks that teach each other, segmenters and detectors, on tiny data."""

import json
from pathlib import Path

from mmengine.config import Config

from tests import tiny_bccd, tiny_det, tiny_seg
from tests.runs import logged, plain_config

SECONDS = dict(
    MinLoss=dict(type='MinLoss'),
    ValidationWeighted=dict(type='ValidationWeighted', metric='mIoU', temperature=5.0),
    General=dict(type='General'),
)
PER_NETWORK = dict(
    constructor='mmdistill_ext.PerNetworkOptimWrapperConstructor',
    a=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
    b=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01)),
)
VIEWS = dict(a=[dict(type='PhotoMetricDistortion')], b=[])


def add_views(pipeline: list, views: dict) -> None:
    """Let a pipeline that ends with a packing transform make these views."""
    pipeline[-1] = dict(type='mmdistill_ext.MakeViews', views=views, pack=pipeline[-1])


def other_network(channels: int = 4) -> dict:
    """A network unlike that of ``tiny_seg``: another stride, another head."""
    model = tiny_seg.model(channels)
    model['backbone']['strides'] = (1, 2, 2, 1)
    model['decode_head'].update(type='PSPHead', pool_scales=(1, 2))
    del model['decode_head']['num_convs']
    return model


def collaborate(cfg: Config, second: dict, metrics: dict | None = None, **students: dict) -> Config:
    """Turn a plain run into that of networks ``a`` and ``b``."""
    cfg = Config(cfg.to_dict())
    cfg.model = dict(
        type='mmdistill_ext.CollaborativeDistiller',
        students=students or dict(a=tiny_seg.model(4), b=other_network()),
        second=second,
        kl=dict(temperature=2.0),
    )
    metrics = metrics or cfg.val_evaluator
    cfg.val_evaluator = dict(type='mmdistill_ext.NetworksEvaluator', metrics=metrics)
    cfg.test_evaluator = cfg.val_evaluator
    cfg.custom_hooks = [dict(type='mmdistill_ext.CollaborationHook', batches=2)]
    cfg.custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
    return cfg


def config(root: Path, work_dir: Path, second: dict, iterations: int = 4) -> Config:
    """Four iterations with a validation after every second."""
    cfg = collaborate(plain_config(root, work_dir, iterations), second)
    cfg.train_cfg.val_interval = 2
    return cfg


def detectors(coco: Path, work_dir: Path) -> Config:
    """ATSS and GFL with views of their own, one epoch of two iterations at a time."""
    name = 'plain/gfl_r18-w16_8e_bccd-320x240.py'
    cfg = tiny_bccd.config(coco, name, work_dir)
    voc = dict(type='VOCMetric', metric='mAP', iou_thrs=0.1)  # hardly trained: mAP 0 at 0.5
    metrics = [cfg.val_evaluator, voc]
    cfg = collaborate(cfg, dict(type='General'), metrics, a=tiny_det.atss(4), b=tiny_det.gfl(6))
    add_views(cfg.train_dataloader.dataset.pipeline, VIEWS)
    cfg.train_cfg.val_interval = 1
    for network in cfg.model.students.values():
        nms = dict(type='nms', iou_threshold=0.9)
        network.test_cfg.update(score_thr=0.0, max_per_img=300, nms=nms)
    return cfg


def validations(work_dir: Path) -> list[dict]:
    """The metrics of each validation."""
    return [line for line in logged(work_dir) if 'weight/a' in line]


def networks_of(work_dir: Path) -> dict:
    return json.loads((work_dir / 'networks.json').read_text())
