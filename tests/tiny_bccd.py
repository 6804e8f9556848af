"""Detection data in BCCD's layout, and the configs of BCCD made small enough for them."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from tests.runs import ROOT

CONFIGS = ROOT / 'configs'
OPTIONS = {
    'train_dataloader.batch_size': 2,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'val_dataloader.batch_size': 2,
    'test_dataloader.num_workers': 0,
    'test_dataloader.persistent_workers': False,
    'test_dataloader.batch_size': 2,
    'default_hooks.logger.interval': 1,
    'default_hooks.checkpoint.interval': 1,
    'env_cfg.dist_cfg.backend': 'gloo',
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 2,
}


def write_coco(root: Path, split: str) -> None:
    """Write four images with boxes in BCCD's layout; one has none, one box is a crowd."""
    rng = np.random.default_rng(len(split))
    (root / 'images' / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images, boxes = [], []
    for i in range(4):
        height, width = (48, 64) if i % 2 else (64, 48)
        picture = rng.integers(0, 255, (height, width, 3), np.uint8)
        cv2.imwrite(str(root / f'images/{split}/{i}.jpg'), picture)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=width, height=height))
        for _ in range(0 if i == 2 else 3):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 20, 2), *rng.integers(12, 28, 2)))
            label = int(rng.integers(1, 4))
            crowd = int(i == 3 and not any(b['iscrowd'] for b in boxes))
            boxes.append(
                dict(
                    id=len(boxes),
                    image_id=i,
                    category_id=label,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=crowd,
                )
            )
    names = ('WBC', 'RBC', 'Platelets')
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
    content = dict(images=images, annotations=boxes, categories=categories)
    (root / f'annotations/{split}.json').write_text(json.dumps(content))


def config(data: Path, name: str, work_dir: Path, **options) -> Config:
    """A config of the project on tiny data, with its roots, sizes and schedule replaced."""
    cfg = Config.fromfile(CONFIGS / name)
    text = cfg.pretty_text.replace('data/bccd', str(data))
    cfg = Config.fromstring(re.sub(r'\b320,(\s*)240\b', r'64,\g<1>64', text), '.py')
    if 'teacher' in cfg.model:
        kind = 'gfl' if 'gfl' in name else 'ret'
        options = {'model.teacher.checkpoint': str(data / f'{kind}.pth'), **options}
        options |= {'custom_hooks.2.interval': 2, 'custom_hooks.1.interval': 1}
    cfg.merge_from_dict({**OPTIONS, 'work_dir': str(work_dir), **options})
    cfg.default_hooks.pop('visualization')
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[:] = [step for step in pipeline if step.type != 'RandomFlip']  # to be repeatable
    cfg.randomness = dict(seed=0)
    return cfg
