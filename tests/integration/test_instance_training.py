"""A real run of Mask R-CNN on instances: SEL on boxes and mask pixels, FIT, and every hook."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from tests.forked_runs import run
from tests.runs import ROOT, last, run_tool, scalars
from tests.tiny_bccd import write_coco
from tests.tiny_zoo import config as zoo_config
from tests.tiny_zoo import save_weights


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('instances')
    for split in ('train', 'val'):
        write_coco(folder, split)
        add_masks(folder / f'annotations/{split}.json')
    save_weights(folder / 't.pth', tiny('mask'), seed=1)
    return folder


def tiny(name):
    return {**zoo_config(name).to_dict(), '_scope_': 'mmdet'}


def add_masks(path):
    """Give every box a triangle as its mask; crowds have run lengths, as in COCO."""
    content = json.loads(path.read_text())
    sizes = {image['id']: (image['height'], image['width']) for image in content['images']}
    for found in content['annotations']:
        x, y, w, h = found['bbox']
        found['segmentation'] = [[x, y, x + w, y, x, y + h]]
        if found['iscrowd']:
            mask = np.zeros(sizes[found['image_id']], np.uint8)
            mask[y : y + h, x : x + w] = 1
            found['segmentation'] = dict(counts=run_lengths(mask), size=list(mask.shape))
    path.write_text(json.dumps(content))


def run_lengths(mask):
    flat = np.concatenate(([0], mask.flatten('F'), [0]))
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate(([0], edges, [mask.size]))).tolist()


def instance_config(root):
    text = (ROOT / 'configs/_base_/datasets/bccd.py').read_text()
    text = text.replace('with_bbox=True', 'with_bbox=True, with_mask=True')
    text = re.sub(r'\b320,(\s*)240\b', r'64,\g<1>64', text.replace('data/bccd', str(root)))
    cfg = Config.fromstring(text.replace("metric='bbox'", "metric=['bbox', 'segm']"), '.py')
    for name in ('_base_/schedules/adamw_8e.py', '_base_/det_runtime.py'):
        cfg.merge_from_dict(Config.fromfile(ROOT / 'configs' / name).to_dict())
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_epochs=2, val_interval=2)
    cfg.default_hooks.pop('visualization')
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.update(interval=1, filename_tmpl='iter_{}.pth')
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.randomness = dict(seed=0)
    cfg.model = dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=tiny('mask'),
        teacher=dict(model=tiny('mask'), checkpoint=str(root / 't.pth')),
        losses=dict(
            sel=dict(type='SelectiveLoss', box=dict(distance='l1')),
            mask=dict(type='SelectiveLoss', head='roi_head.mask_head'),
        ),
        fit=dict(function=dict(type='LogisticFit', b=1e6), split='unit'),
    )
    cfg.custom_hooks = [
        dict(type='mmdistill_ext.StartCheckHook', check_labels=4),
        dict(type='mmdistill_ext.TeacherShareHook', interval=1),
        dict(type='mmdistill_ext.ContrastMaskHook', interval=2, max_images=2),
        dict(type='mmdistill_ext.FitHook', interval=2, batches=1, measure_train=True),
        dict(type='mmdistill_ext.BoxComparisonHook', max_images=2, score_thr=0.05),
    ]
    return cfg


def test_from_training_to_the_shipped_student(root, tmp_path):
    run(instance_config(root), tmp_path)
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    for scalar in ('bbox.loss_sel_box:', 'mask.loss_mask:', 'mask.l_hard:', 'loss_mask:'):
        assert scalar in log
    names = ('teacher_better/mask/inside', 'teacher_better/sel/background', 'fit/error')
    found = np.array(scalars(tmp_path, *names)[4], float)
    assert np.isfinite(found).all()
    weights = last(tmp_path)['state_dict']
    assert all(np.isfinite(value.numpy()).all() for value in weights.values())
    assert not any(key.startswith(('teacher', 'distillation')) for key in weights)

    folder = next((tmp_path / 'work').glob('*/vis_data'))
    for loss in ('sel', 'mask'):
        masks = sorted(folder.glob(f'contrast_masks/iter_4/{loss}/*.png'))
        assert len(masks) == 2
        seen = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in masks]
        assert all(mask.shape in {(48, 64), (64, 48)} for mask in seen)
        assert set(np.unique(np.concatenate([mask.ravel() for mask in seen]))) - {128}
    assert len(list(folder.glob('boxes/iter_4/*.png'))) == 2

    checkpoint = tmp_path / 'work/iter_2.pth'
    run_tool(ROOT / 'tools/export_student.py', 'run.py', checkpoint, 'out', cwd=tmp_path)
    first = run_tool(ROOT / 'tools/test.py', 'run.py', checkpoint, cwd=tmp_path)

    import mmdet

    tool = Path(mmdet.__file__).parent / '.mim/tools/test.py'
    second = run_tool(tool, 'out/student.py', 'out/student.pth', '--work-dir', 'x', cwd=tmp_path)
    scores = [re.findall(r'coco/\w+_mAP\w*: (-?[\d.]+)', text) for text in (first, second)]
    assert len(scores[0]) == 12
    assert scores[0] == scores[1]


def test_validation_data_without_masks_are_refused_at_the_start(root, tmp_path):
    cfg = instance_config(root)
    for step in cfg.val_dataloader.dataset.pipeline:
        step.pop('with_mask', None)
    from mmengine.runner import Runner

    cfg.work_dir, cfg.experiment_name = str(tmp_path), tmp_path.name
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ValueError, match='should load annotations .boxes and masks.'):
        runner.train()
