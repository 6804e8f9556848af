import math

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.hooks.start_check_hook import (
    StartCheckHook,
    check_class_order,
    check_floor,
    label_range,
)
from tests import tiny_seg


@pytest.fixture
def run(tmp_path):
    """Return a function that trains the tiny distillation run with a StartCheckHook."""
    root = tmp_path / 'data'
    for split in ('train', 'val'):
        tiny_seg.write_data(root, split)
    weights = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)

    def start(**arguments):
        hook = dict(type='mmdistill_ext.StartCheckHook', **arguments)
        cfg = tiny_seg.distil(tiny_seg.config(root, tmp_path / 'work'), weights, check=hook)
        cfg.experiment_name = f'{tmp_path.name}-{len(arguments)}-{torch.rand(1).item()}'
        cfg.default_hooks.pop('visualization')
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner

    start.root = root
    return start


def test_checks_change_nothing_in_the_training(run):
    with_checks = run(check_labels=4, check_teacher=True, floor=dict(mIoU=0.0)).model.state_dict()
    without = run(check_labels=0).model.state_dict()
    assert all(torch.equal(with_checks[key], without[key]) for key in without)


def test_label_outside_the_classes_names_file_and_value(run):
    path = run.root / 'ann/train/2.png'
    cv2.imwrite(str(path), np.full((24, 36), 5, np.uint8))
    with pytest.raises(ValueError, match=r'\[0, 3\) or 255.*Found \[5\] in .*ann/train/2.png'):
        run(check_labels=4)


@pytest.mark.parametrize('losses', [dict(type='KDLoss'), dict(type='CWDLoss', tap='decode_head')])
@pytest.mark.parametrize('ignored', [255, None])
def test_a_binary_head_has_labels_0_and_1(losses, ignored):
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    cfg = tiny_seg.model(8, num_classes=1)
    cfg['decode_head'].update(loss_decode=loss, ignore_index=ignored)
    cfg = {'_scope_': 'mmseg', **cfg}
    model = build_teacher_student(cfg, dict(model=cfg, pretrained=True), dict(a=losses))
    assert label_range(model) == (2, ignored or -1)


def test_teacher_below_the_floor_is_refused(run):
    with pytest.raises(ValueError, match='The teacher should reach mIoU >= 99.0.*Found'):
        run(check_labels=0, check_teacher=True, floor=dict(mIoU=99.0))


@pytest.mark.parametrize('score', [39.9, math.nan])
def test_low_or_undefined_score_is_below_the_floor(score):
    with pytest.raises(ValueError, match=f'mIoU >= 40.*Found {score}'):
        check_floor({'mIoU': score}, dict(mIoU=40))
    check_floor({'coco/bbox_mAP': 0.4}, dict(bbox_mAP=0.4))


def test_unknown_metric_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'mAP' is none. Found \['aAcc', 'mIoU'\]"):
        check_floor({'mIoU': 50.0, 'aAcc': 80.0}, dict(mAP=40))


def test_class_order():
    check_class_order(('a', 'b'), ('a', 'b'))
    check_class_order(None, ('a', 'b'))
    check_class_order(('a', 'b'), ('c', 'd'))  # other names may mean the same
    with pytest.raises(ValueError, match=r"order of the training data.*\('b', 'a'\)"):
        check_class_order(('b', 'a'), ('a', 'b'))


@pytest.mark.parametrize('arguments', [dict(check_labels=-1), dict(floor=dict(mIoU=1.0))])
def test_impossible_arguments(arguments):
    with pytest.raises(ValueError, match='StartCheckHook'):
        StartCheckHook(**arguments)


def test_model_without_teacher_is_refused(tmp_path):
    tiny_seg.write_data(tmp_path, 'train')
    tiny_seg.write_data(tmp_path, 'val')
    cfg = tiny_seg.config(tmp_path, tmp_path / 'work')
    cfg.custom_hooks = [dict(type='mmdistill_ext.StartCheckHook')]
    cfg.experiment_name = tmp_path.name
    with pytest.raises(
        ValueError, match='`StartCheckHook` needs a model with a teacher.*EncoderDec'
    ):
        Runner.from_cfg(cfg).train()
