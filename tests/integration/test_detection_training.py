"""Real runs of distilled detectors on tiny data, through a Runner and through the tools."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdistill_ext.distillers.build import build_model
from tests.runs import ROOT, assert_identical, run_tool, state_of, train
from tests.tiny_bccd import CONFIGS, config


def trained(cfg: Config) -> dict:
    return state_of(sorted(train(cfg).glob('epoch_*.pth'))[-1])


@pytest.mark.parametrize('head', ['retinanet', 'gfl'])
def test_weight_0_trains_bit_identically_to_the_plain_config(data, tmp_path, head):
    plain = trained(config(data, f'plain/{head}_r18-w16_8e_bccd-320x240.py', tmp_path / 'plain'))
    name = f'selective/sel_{head}_r18_{head}_r18-w16_8e_bccd-320x240.py'
    options = {'model.losses.sel.weight': 0.0}
    distilled = trained(config(data, name, tmp_path / 'distilled', **options))
    for part in ('state_dict', 'optimizer'):
        assert_identical(plain[part], distilled[part])


@pytest.mark.parametrize('name', ['kd/kd', 'selective/sel'])
def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path, name):
    name = f'{name}_gfl_r18_gfl_r18-w16_8e_bccd-320x240.py'
    whole = trained(config(data, name, tmp_path / 'whole'))
    options = dict(resume=True, load_from=str(tmp_path / 'whole/epoch_1.pth'))
    part = trained(config(data, name, tmp_path / 'part', **options))
    for key in ('state_dict', 'optimizer'):
        assert_identical(whole[key], part[key])


def test_contrast_masks_have_the_images_size(data, tmp_path):
    name = 'selective/sel_retinanet_r18_retinanet_r18-w16_8e_bccd-320x240.py'
    trained(config(data, name, tmp_path))
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
