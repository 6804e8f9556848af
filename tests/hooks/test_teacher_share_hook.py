"""How often the teacher is better, as logged scalars."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner import Runner

from mmdistill_ext.hooks.common import publish
from mmdistill_ext.hooks.teacher_share_hook import TeacherShareHook, shares
from tests import tiny_seg


def test_shares_overall_and_per_class():
    counts = torch.tensor([[30, 0, 10], [6, 0, 10]])
    assert shares(counts, 'sel', tiny_seg.CLASSES) == {
        'train/teacher_better/sel': 16 / 40,
        'train/teacher_better/sel/sky': 6 / 30,
        'train/teacher_better/sel/traffic_light': None,
        'train/teacher_better/sel/road': 1.0,
    }
    assert shares(torch.zeros(2, 3), 'sel', ()) == {'train/teacher_better/sel': None}


def test_published_values_are_current_whatever_the_name():
    tiny_seg.forget_runs()
    hub = MessageHub.get_instance('shares')
    for value in (1.0, 0.5):
        publish(hub, {'train/loss_of_time': value, 'train/gone': value})
    assert hub.get_scalar('train/loss_of_time').mean(10) == 0.5
    publish(hub, {'train/gone': None})
    assert 'train/gone' not in hub.log_scalars


@pytest.mark.parametrize('interval', [0, -1])
def test_interval_is_checked(interval: int):
    with pytest.raises(ValueError, match=rf'`TeacherShareHook\.interval`.*Found {interval}'):
        TeacherShareHook(interval)


def test_model_without_a_teacher_is_refused():
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), hooks=[])
    with pytest.raises(ValueError, match=r'`TeacherShareHook` needs.*Linear'):
        TeacherShareHook().before_train(runner)


def test_share_of_a_run_covers_all_iterations_since_the_last_log(tmp_path: Path):
    """Two iterations per log see the four images once."""
    tiny_seg.forget_runs()
    tiny_seg.write_data(tmp_path, 'train')
    teacher = tiny_seg.save_weights(tmp_path / 'teacher.pth', tiny_seg.model(16), seed=1)
    cfg = tiny_seg.config(tmp_path, tmp_path / 'work')
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.logger.interval = 2
    cfg = tiny_seg.distil(cfg, teacher, share=dict(type='mmdistill_ext.TeacherShareHook'))
    runner = Runner.from_cfg(cfg)
    loss, popped = runner.model.distillation.losses['sel'], []
    pop = loss.records.pop_counts
    loss.records.pop_counts = lambda: popped.append(pop()) or popped[-1].clone()
    runner.train()

    labels = [cv2.imread(str(path), 0) for path in (tmp_path / 'ann/train').iterdir()]
    pixels = [sum(int((label == index).sum()) for label in labels) for index in range(3)]
    lines = next(tmp_path.rglob('scalars.json')).read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [row['step'] for row in logged] == [2, 4]
    names = ('sky', 'traffic_light', 'road')
    for row, (units, wins) in zip(logged, popped, strict=True):
        assert units.tolist() == pixels
        assert row['teacher_better/sel'] == pytest.approx(int(wins.sum()) / sum(pixels))
        for name, won, of in zip(names, wins.tolist(), pixels, strict=True):
            assert row[f'teacher_better/sel/{name}'] == pytest.approx(won / of)
    assert 0 < logged[0]['teacher_better/sel'] < 1
