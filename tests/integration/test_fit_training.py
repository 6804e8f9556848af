"""Real runs with the fit loss on tiny data, through tools/train.py (FIT-6, FIT-7)."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests import tiny_seg
from tests.forked_runs import run, run_two, start, write
from tests.runs import assert_identical, last, scalars


def config(root, teacher, function, **hook):
    """A run with the fit loss; without hook arguments, no FitHook."""
    cfg = tiny_seg.config(root, root)
    cfg.train_cfg.update(max_iters=6, val_interval=100)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.default_hooks.pop('visualization')
    cfg.model.decode_head.loss_decode.avg_non_ignore = True
    hooks = dict(fit=dict(type='mmdistill_ext.FitHook', **hook)) if hook else {}
    cfg = tiny_seg.distil(cfg, teacher, **hooks)
    cfg.model.losses = dict(kd=dict(type='KDLoss', temperature=2.0))
    if function is None:
        cfg.model.fuse_task_loss = True
    else:
        cfg.model.fit = dict(function=function)
    cfg.pop('work_dir')
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    return cfg


def noisy(cfg):
    """Random numbers everywhere: in the training's pipeline and model, and in the measurement."""
    cfg.model.student.decode_head.dropout_ratio = 0.3
    flip = dict(type='RandomFlip', prob=0.5)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.pipeline.insert(2, flip)
    return cfg


CONSTANT = dict(type='ConstantFit', c=1.0)
MEASURED = dict(interval=2, batches=3, measure_train=True)


@pytest.mark.parametrize('runner', [run, run_two], ids=['one', 'two'])
def test_measuring_changes_nothing(root, teacher, tmp_path, runner):
    """FIT-6, and F = 1 is plain distillation: bit-identical weights, buffers, optimizer, losses."""
    plans = dict(
        plain=config(root, teacher, None),
        unmeasured=config(root, teacher, CONSTANT),
        measured=config(root, teacher, CONSTANT, **MEASURED),
    )
    for name, cfg in plans.items():
        runner(noisy(cfg), tmp_path / name)
    expected = last(tmp_path / 'plain')
    names = 'decode.acc_seg', 'lr', 'decode.loss_ce', 'decode.loss_kd', 'loss'
    logged = scalars(tmp_path / 'plain', *names)
    assert len(logged) == 6
    assert None not in logged[1]
    for name in ('unmeasured', 'measured'):
        for part in ('state_dict', 'optimizer'):
            assert_identical(last(tmp_path / name)[part], expected[part])
        assert scalars(tmp_path / name, *names) == logged
    history = last(tmp_path / 'measured')['fit']['history']
    assert [row['iter'] for row in history] == [2, 4, 6]
    assert len({row['error'] for row in history}) == 3


def test_two_processes_equal_one_with_the_same_global_batch(root, teacher, tmp_path):
    """With a base so large that the small error of a short run counts."""
    cfg = config(root, teacher, dict(type='ExponentialFit', b=1e200), interval=2, batches=2)
    cfg.model.student.backbone.norm_eval = True
    cfg.model.student.decode_head.norm_cfg = None
    cfg.model.student.decode_head.loss_decode.avg_non_ignore = False  # else: mean of rank means
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.val_dataloader.batch_size = 2
    cfg.val_dataloader.dataset.indices = [0, 1]  # of one size
    run(cfg, tmp_path / 'one')
    cfg.train_dataloader.batch_size = cfg.val_dataloader.batch_size = 1
    run_two(cfg, tmp_path / 'two')
    one, two = last(tmp_path / 'one'), last(tmp_path / 'two')
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][key], value, atol=1e-5, rtol=1e-5, msg=key)
    seen = []
    for first, second in zip(one['fit']['history'], two['fit']['history'], strict=True):
        weights = second.pop('weight'), first.pop('weight')
        seen.append(weights[0])
        assert weights[0] == pytest.approx(weights[1], rel=0.01)  # an error times log b
        assert second == pytest.approx(first, abs=1e-5)
    assert max(abs(weight - 1) for weight in seen) > 0.01


def test_killed_five_times_it_ends_as_if_never_stopped(root, teacher, tmp_path):
    function = dict(type='LogisticFit', b=1e3)
    cfg = config(root, teacher, function, interval=3, batches=2, window=5, measure_train=True)
    cfg.train_cfg.max_iters = 24
    cfg.default_hooks.checkpoint.interval = 2
    cfg.train_dataloader.num_workers = 0
    run(cfg, tmp_path / 'whole')
    draw = random.Random(0)
    write(cfg, tmp_path / 'killed')
    for reached in sorted(draw.sample(range(1, 24), 5)):
        process = start(tmp_path / 'killed', '--resume')
        kill_when_reached(process, tmp_path / 'killed', reached)
    run(cfg, tmp_path / 'killed', '--resume')
    whole, killed = last(tmp_path / 'whole'), last(tmp_path / 'killed')
    for part in ('state_dict', 'optimizer', 'fit'):
        assert_identical(killed[part], whole[part])
    names = [f'fit/{n}' for n in ('error', 'weight', 'train_gt_loss', 'val_gt_loss')]
    expected = scalars(tmp_path / 'whole', *names)
    assert scalars(tmp_path / 'killed', *names) == expected
    assert len(expected) == 24
    assert whole['fit']['positions'] == dict(val=16, train=16)

    tiny_seg.tool('test')(
        tmp_path / 'killed/run.py', tmp_path / 'killed/work/iter_24.pth', '--work-dir', tmp_path
    )
    assert list(tmp_path.glob('*/*.json'))


def kill_when_reached(process, folder, iteration):
    """SIGKILL once the log has this iteration, wherever the run is by then."""
    deadline = time.monotonic() + 120
    while process.is_alive() and max(scalars(folder, 'loss'), default=0) < iteration:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_run_leaves_scalars_and_a_picture(root, teacher, tmp_path):
    cfg = config(root, teacher, dict(type='ExponentialFit'), **MEASURED)
    run(cfg, tmp_path)
    names = ('error', 'weight', 'train_gt_loss', 'val_gt_loss', 'simple_share', 'cost')
    rows = scalars(tmp_path, *(f'fit/{name}' for name in names))
    assert rows[1] == [None] * 6  # not measured yet
    error, weight, _, validation, simple, cost = rows[6]
    (history,) = [r for r in last(tmp_path)['fit']['history'] if r['iter'] == 6]
    assert history['error'] == error == history['train_gt_loss_eval'] - validation
    assert weight == pytest.approx(min(10**error, 2))
    assert 0 < simple < 1
    assert 0 < cost < 1
    (picture,) = tmp_path.glob('work/*/vis_data/fit.png')
    assert picture.stat().st_size > 10_000
    assert list(tmp_path.glob('work/*/vis_data/vis_image/fit_*.png'))
    assert 'FIT: measuring took' in next(Path(tmp_path, 'work').glob('*/*.log')).read_text()
