"""Names of metrics are checked before the first iteration."""

from types import SimpleNamespace

import pytest
from mmdet.evaluation import CocoMetric, VOCMetric
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from mmdistill_ext import cli
from mmdistill_ext.hooks.metric_names import check_metric, known_names, names_of_evaluator
from tests import tiny_collaboration, tiny_seg
from tests.runs import assert_identical, logged, plain_config, state_of, train


@pytest.mark.parametrize(
    ('metric', 'names'),
    [
        (IoUMetric(), {'aAcc', 'mIoU', 'mAcc'}),
        (IoUMetric(iou_metrics=['mDice'], prefix='x'), {'x/aAcc', 'x/mDice', 'x/mAcc'}),
        (VOCMetric(), None),
    ],
)
def test_known_names(metric, names):
    assert known_names(metric) == names


def test_names_of_coco(coco):
    file = str(coco / 'annotations/val.json')
    names = known_names(CocoMetric(ann_file=file, metric=['bbox', 'segm']))
    assert {'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP_l'} < names
    assert len(names) == 12
    assert known_names(CocoMetric(ann_file=file, classwise=True)) is None
    assert known_names(CocoMetric(ann_file=file, metric='proposal')) is None


def test_one_unknown_metric_leaves_all_open():
    evaluator = SimpleNamespace(metrics=[IoUMetric(), VOCMetric()])
    assert names_of_evaluator(evaluator) is None
    check_metric('a', 'anything', None)


def test_known_names_are_what_a_run_gives(root, tmp_path):
    cfg = plain_config(root, tmp_path)
    cfg.val_evaluator.iou_metrics = ['mIoU', 'mDice', 'mFscore']
    cfg.train_cfg.val_interval = 2
    (found, *_) = [line for line in logged(train(cfg)) if 'mIoU' in line]
    names = known_names(IoUMetric(iou_metrics=['mIoU', 'mDice', 'mFscore']))
    assert names == {name for name in found if name[:1] in 'am' and name[1:2].isupper()}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'default_hooks.checkpoint.save_best': 'mmIoU'}, '`default_hooks.checkpoint.*mmIoU'),
        ({'default_hooks.checkpoint.save_best': ['mIoU', 'aAc']}, '`default_hooks.checkpoint'),
        ({'default_hooks.checkpoint.save_bst': 'mIoU'}, '`default_hooks.checkpoint.save_bst`'),
        ({'val_evaluator.iou_metrics': ['mIuO']}, '`val_evaluator.iou_metrics` should be one of'),
    ],
)
def test_a_plain_run_is_refused_before_it_starts(root, tmp_path, change, message):
    cfg = plain_config(root, tmp_path)
    cfg.default_hooks.checkpoint.rule = 'greater'
    cfg.merge_from_dict(change)
    tiny_seg.forget_runs()
    with pytest.raises(ValueError, match=message):
        cli.train(cli.build_runner(cfg))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model.second.metric': 'mIoUU'}, "`second.metric` should be a metric.*is it 'mIoU'"),
        ({'custom_hooks': [dict(type='mmdistill_ext.CollaborationHook', metric='mACC')]}, 'mAcc'),
        (
            {
                'default_hooks.checkpoint.save_best': 'c/mIoU',
                'default_hooks.checkpoint.rule': 'greater',
            },
            "`default_hooks.checkpoint.save_best` .*Found 'c/mIoU'",
        ),
    ],
)
def test_a_collaborative_run_is_refused_by_any_runner(root, tmp_path, change, message):
    second = dict(type='ValidationWeighted', metric='mIoU', temperature=1.0)
    cfg = Config(tiny_collaboration.config(root, tmp_path, second).to_dict())
    cfg.merge_from_dict(change)
    with pytest.raises(ValueError, match=message):
        train(cfg)


def test_a_model_that_cannot_predict_is_refused_before_it_starts(root, tmp_path):
    cfg = plain_config(root, tmp_path / 'a')
    cfg.model.test_cfg.mode = 'wole'
    tiny_seg.forget_runs()
    with pytest.raises(ValueError, match='^`model`: AssertionError: .*wole'):
        cli.train(cli.build_runner(cfg))
    cfg = tiny_collaboration.config(root, tmp_path / 'b', dict(type='MinLoss'))
    cfg.model.students.b.test_cfg.mode = 'wole'
    tiny_seg.forget_runs()
    with pytest.raises(ValueError, match='^`students.b`: AssertionError: .*wole'):
        cli.train(cli.build_runner(cfg))


def test_the_first_prediction_changes_nothing(root, tmp_path):
    states = []
    for name, run in (('a', cli.train), ('b', lambda runner: runner.train())):
        cfg = plain_config(root, tmp_path / name)
        tiny_seg.forget_runs()
        run(cli.build_runner(cfg))
        states.append(state_of(tmp_path / name / 'iter_4.pth'))
    assert_identical(states[0]['state_dict'], states[1]['state_dict'])
    assert_identical(states[0]['optimizer'], states[1]['optimizer'])
