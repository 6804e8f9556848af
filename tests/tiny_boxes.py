"""A distillation run of detectors on four images of several sizes, seen at half their size."""

import json
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from tests import tiny_det

SIZES = ((120, 160), (96, 128), (120, 160), (160, 120))  # the second one's picture is smaller
BOXES = [[[20, 30, 60, 50], [90, 60, 40, 40]], [[30, 20, 50, 40]], [], [[10, 60, 70, 60]]]
META = dict(classes=tiny_det.CLASSES, palette=[(0, 114, 178), (213, 94, 0), (0, 158, 115)])


def write_data(root: Path) -> None:
    """Write four images in COCO's layout; boxes as x, y, width, height; the third has none."""
    rng = np.random.default_rng(0)
    (root / 'img').mkdir(parents=True)
    images, boxes = [], []
    for i, (height, width) in enumerate(SIZES):
        picture = rng.integers(100, 156, (height, width, 3), np.uint8)
        cv2.imwrite(str(root / f'img/cells{i}.png'), picture)
        images.append(dict(id=i, file_name=f'cells{i}.png', width=width, height=height))
        for j, box in enumerate(BOXES[i]):
            known = dict(id=len(boxes), image_id=i, category_id=j + 1, iscrowd=0)
            x, y, w, h = box
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            boxes.append(dict(known, bbox=box, area=w * h, segmentation=outline))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(tiny_det.CLASSES)]
    content = dict(images=images, annotations=boxes, categories=categories)
    (root / 'ann.json').write_text(json.dumps(content))


def retina(channels: int) -> dict:
    """Return a detector that finds a few boxes."""
    cfg = tiny_det.retina(channels)
    return dict(cfg, test_cfg=dict(cfg['test_cfg'], max_per_img=5))


def loader(root: Path, training: bool) -> dict:
    """Return a loader of two images; they are shown to the models at half their size."""
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale_factor=0.5, keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ]
    if training:
        steps[1:3] = steps[2:0:-1]
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=training),
        dataset=dict(
            type='CocoDataset',
            data_root=str(root),
            ann_file='ann.json',
            data_prefix=dict(img='img/'),
            metainfo=META,
            pipeline=steps,
            test_mode=not training,
        ),
    )


def config(root: Path, hook: dict | None) -> Config:
    """Return a run of two iterations with a validation after each."""
    if not root.exists():
        write_data(root)
        tiny_det.save_weights(root / 'teacher.pth', retina(16), seed=3)
        tiny_det.save_weights(root / 'student.pth', retina(8), seed=7)
    evaluator = dict(type='CocoMetric', ann_file=str(root / 'ann.json'), metric='bbox')
    model = dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=retina(8),
        teacher=dict(model=retina(16), checkpoint=str(root / 'teacher.pth')),
        losses=dict(sel=dict(type='SelectiveLoss', average='positive')),
    )
    return Config(
        dict(
            default_scope='mmdet',
            custom_imports=dict(imports=['mmdistill_ext'], allow_failed_imports=False),
            model=model,
            train_dataloader=loader(root, training=True),
            val_dataloader=loader(root, training=False),
            val_evaluator=evaluator,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=1),
            val_cfg=dict(type='ValLoop'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.001)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
            custom_hooks=[]
            if hook is None
            else [{'type': 'mmdistill_ext.BoxComparisonHook', **hook}],
            visualizer=dict(
                type='DetLocalVisualizer',
                vis_backends=[dict(type='LocalVisBackend')],
                name='visualizer',
            ),
            log_processor=dict(by_epoch=False),
            load_from=str(root / 'student.pth'),
            work_dir=str(root.parent / 'work'),
            randomness=dict(seed=0),
        )
    )
