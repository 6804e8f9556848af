"""Real runs of distilled detectors on tiny data, through a Runner and through the tools."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdistill_ext.distillers.build import build_model
from tests import tiny_seg
from tests.integration.test_segmentation_training import assert_identical, run_tool

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    for split in ('train', 'val'):
        write_coco(folder, split)
    for name in ('retinanet_r18_16e', 'gfl_r18_24e'):
        cfg = Config.fromfile(CONFIGS / f'plain/{name}_bccd-320x240.py')
        torch.manual_seed(1)
        teacher = build_model({'_scope_': 'mmdet', **cfg.model})
        torch.save(dict(state_dict=teacher.state_dict()), folder / f'{name[:3]}.pth')
    return folder


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


def train(cfg: Config) -> dict:
    tiny_seg.forget_runs()
    Runner.from_cfg(cfg).train()
    last = sorted(Path(cfg.work_dir).glob('epoch_*.pth'))[-1]
    return torch.load(last, weights_only=False)


@pytest.mark.parametrize('head', ['retinanet', 'gfl'])
def test_weight_0_trains_bit_identically_to_the_plain_config(data, tmp_path, head):
    plain = train(config(data, f'plain/{head}_r18-w16_8e_bccd-320x240.py', tmp_path / 'plain'))
    name = f'selective/sel_{head}_r18_{head}_r18-w16_8e_bccd-320x240.py'
    options = {'model.losses.sel.weight': 0.0}
    distilled = train(config(data, name, tmp_path / 'distilled', **options))
    for part in ('state_dict', 'optimizer'):
        assert_identical(plain[part], distilled[part])


@pytest.mark.parametrize('name', ['kd/kd', 'selective/sel'])
def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path, name):
    name = f'{name}_gfl_r18_gfl_r18-w16_8e_bccd-320x240.py'
    whole = train(config(data, name, tmp_path / 'whole'))
    options = dict(resume=True, load_from=str(tmp_path / 'whole/epoch_1.pth'))
    part = train(config(data, name, tmp_path / 'part', **options))
    for key in ('state_dict', 'optimizer'):
        assert_identical(whole[key], part[key])


def test_contrast_masks_have_the_images_size(data, tmp_path):
    name = 'selective/sel_retinanet_r18_retinanet_r18-w16_8e_bccd-320x240.py'
    train(config(data, name, tmp_path))
    masks = list(tmp_path.glob('*/vis_data/contrast_masks/iter_2/sel/*.png'))
    assert {path.stem.split('_')[-1] for path in masks} == {
        f'stride{stride}' for stride in (8, 16, 32, 64, 128)
    }
    for path in masks:
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask.shape in {(48, 64), (64, 48)}
        assert set(np.unique(mask)) <= {0, 128, 255}


def test_from_training_to_the_shipped_student(data, tmp_path):
    """Train, test, export, and test again with mmdet's own tool: the metrics are the same."""
    name = 'selective/sel_retinanet_r18_retinanet_r18-w16_8e_bccd-320x240.py'
    options = {'model.student.test_cfg.score_thr': 0.0}  # hardly trained
    config(data, name, tmp_path / 'work', **options).dump(tmp_path / 'run.py')
    log = run_tool(ROOT / 'tools/train.py', 'run.py', cwd=tmp_path)
    for scalar in ('eta:', 'bbox.loss_sel:', 'bbox.loss_sel_box:', 'teacher_better/sel/background'):
        assert scalar in log
    checkpoint = tmp_path / 'work/epoch_2.pth'
    away = tmp_path / 'away.pth'
    shutil.move(data / 'ret.pth', away)  # testing needs no teacher
    try:
        first = run_tool(ROOT / 'tools/test.py', 'run.py', checkpoint, cwd=tmp_path)
        run_tool(ROOT / 'tools/export_student.py', 'run.py', checkpoint, 'out', cwd=tmp_path)
    finally:
        shutil.move(away, data / 'ret.pth')

    import mmdet

    tool = Path(mmdet.__file__).parent / '.mim/tools/test.py'
    second = run_tool(tool, 'out/student.py', 'out/student.pth', '--work-dir', 'x', cwd=tmp_path)
    scores = [re.findall(r'coco/bbox_mAP\w*: (-?[\d.]+)', text) for text in (first, second)]
    assert len(scores[0]) == 6
    assert scores[0] == scores[1]


def test_label_outside_the_classes_is_refused(data, tmp_path):
    name = 'kd/kd_retinanet_r18_retinanet_r18-w16_8e_bccd-320x240.py'
    options = {'model.student.bbox_head.num_classes': 2, 'model.teacher.model': 'x.py'}
    cfg = config(data, name, tmp_path / 'w', **options)
    teacher = Config.fromfile(CONFIGS / 'plain/retinanet_r18_16e_bccd-320x240.py').model
    teacher.bbox_head.num_classes = 2
    cfg.model.teacher.model = {'_scope_': 'mmdet', **teacher}
    weights = build_model(cfg.model.teacher.model).state_dict()
    torch.save(dict(state_dict=weights), tmp_path / 't.pth')
    cfg.model.teacher.checkpoint = str(tmp_path / 't.pth')
    with pytest.raises(ValueError, match=r'Labels should be in \[0, 2\).*Found \[2\] in .*jpg'):
        train(cfg)
