"""Real runs of detectors with the fit loss on tiny data, through tools/train.py (FIT-6, FIT-7)."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdistill_ext.hooks import FitHook
from tests import tiny_det, tiny_seg, tiny_zoo
from tests.forked_runs import run, run_two
from tests.runs import assert_identical, last, scalars
from tests.tiny_bccd import CONFIGS, config

CONSTANT = dict(type='ConstantFit', c=1.0)
HEADS = ('retinanet', 'gfl')
SCALARS = [f'fit/{name}' for name in ('error', 'weight', 'train_gt_loss', 'val_gt_loss')]


def fit_config(data, head, function, split='unit', **hook):
    """A run with SEL and the fit loss; without hook arguments, no FitHook."""
    name = f'fit/fit-sel_{head}_r18_{head}_r18-w16_8e_bccd-320x240.py'
    cfg = config(data, name, data)
    cfg.pop('work_dir')
    cfg.model.fit = dict(function=function, split=split)
    hook = dict(hook, type='mmdistill_ext.FitHook') if hook else None
    cfg.custom_hooks = [*cfg.custom_hooks[:3], *([hook] if hook else [])]
    cfg.train_cfg.update(max_epochs=3, val_interval=100)
    cfg.default_hooks.checkpoint.filename_tmpl = 'iter_{}.pth'  # each epoch
    return cfg


def with_models(cfg, folder, tiny, save):
    """The same with other detectors, of the same family both; boxes are distilled by IoU."""
    path, options = save(folder / 'teacher.pth', tiny, seed=1), cfg.to_dict()
    options['model'].update(student=tiny, teacher=dict(model=tiny, checkpoint=path))
    options['model']['losses']['sel'].update(box=dict(distance='iou'))
    return Config(options)


@pytest.mark.parametrize('head', ['gfl', 'faster'])
def test_measuring_changes_nothing(data, tmp_path, head):
    """FIT-6, and F = 1 is the run without the fit loss."""
    measured = dict(interval=2, batches=2, measure_train=True)
    base = 'gfl' if head == 'faster' else head
    plans = dict(
        plain=fit_config(data, base, CONSTANT),
        unmeasured=fit_config(data, base, CONSTANT),
        measured=fit_config(data, base, CONSTANT, **measured),
    )
    del plans['plain'].model['fit']
    if head == 'faster':
        del plans['unmeasured']  # its training is slow
    for name, cfg in plans.items():
        if head == 'faster':
            cfg.model.losses.sel.average = 'selected'
            tiny = {**tiny_zoo.config('faster').to_dict(), '_scope_': 'mmdet'}
            cfg = with_models(cfg, tmp_path, tiny, tiny_zoo.save_weights)
        run(cfg, tmp_path / name)
    expected = last(tmp_path / 'plain')
    losses = scalars(tmp_path / 'plain', 'loss_cls', 'bbox.loss_sel', 'lr')
    assert len(losses) == 6
    for name in plans:
        for part in ('state_dict', 'optimizer'):
            assert_identical(last(tmp_path / name)[part], expected[part])
        assert scalars(tmp_path / name, 'loss_cls', 'bbox.loss_sel', 'lr') == losses
    history = last(tmp_path / 'measured')['fit']['history']
    assert [row['iter'] for row in history] == [2, 4, 6]
    assert len({row['error'] for row in history}) == 3
    assert all(0 <= row['simple_share'] <= 1 for row in history)


@pytest.mark.parametrize(('head', 'split'), [('retinanet', 'image'), ('gfl', 'unit')])
def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path, head, split):
    function = dict(type='LogisticFit', b=1e3)
    cfg = fit_config(data, head, function, split, interval=2, batches=1, window=3)
    run(cfg, tmp_path / 'whole')
    cfg.resume, cfg.load_from = True, str(tmp_path / 'whole/work/iter_2.pth')
    run(cfg, tmp_path / 'part')
    for key in ('state_dict', 'optimizer', 'fit'):
        assert_identical(last(tmp_path / 'part')[key], last(tmp_path / 'whole')[key])
    assert scalars(tmp_path / 'part', *SCALARS)[6] == scalars(tmp_path / 'whole', *SCALARS)[6]
    assert scalars(tmp_path / 'whole', 'fit/weight')[6][0] not in (None, 1)


def test_two_processes_equal_one_with_the_same_global_batch(data, tmp_path):
    """One of the two images has no box. FCOS divides by all ranks' positives and by no less."""
    cfg = fit_config(data, 'gfl', dict(type='LogisticFit', b=1e50), interval=2, batches=1)
    tiny = {'_scope_': 'mmdet', **tiny_det.fcos()}
    cfg = with_models(cfg, tmp_path, tiny, tiny_det.save_weights)
    cfg.train_dataloader.dataset.indices = cfg.val_dataloader.dataset.indices = [0, 2]
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    cfg.train_cfg.max_epochs = 4
    run(cfg, tmp_path / 'one')
    cfg.train_dataloader.batch_size = cfg.val_dataloader.batch_size = 1
    run_two(cfg, tmp_path / 'two')
    one, two = last(tmp_path / 'one'), last(tmp_path / 'two')
    for key, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][key], value, atol=1e-5, rtol=1e-5, msg=key)
    pairs = list(zip(one['fit']['history'], two['fit']['history'], strict=True))
    assert len(pairs) == 2
    for first, second in pairs:
        assert second == pytest.approx(first, abs=2e-2)


def test_the_config_is_what_the_tools_take():
    for head in HEADS:
        name = f'fit/fit-sel_{head}_r18_{head}_r18-w16_8e_bccd-320x240.py'
        hooks = Config.fromfile(CONFIGS / name).custom_hooks
        assert hooks[-1].type == 'mmdistill_ext.FitHook'


def test_validation_is_measured_in_batches_of_the_training(data, tmp_path):
    """The head divides by the positives of its batch, so the batch's size matters."""
    cfg = fit_config(data, 'gfl', CONSTANT, interval=2, batches=1, measure_train=True)
    cfg.val_dataloader.batch_size = 1
    cfg.work_dir, cfg.experiment_name = str(tmp_path), tmp_path.name
    tiny_seg.forget_runs()
    runner = Runner.from_cfg(cfg)
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, FitHook))
    for loader in [meter.loader for meter in hook.meters.values()]:
        assert loader.batch_size == cfg.train_dataloader.batch_size == 2
        kinds = [type(step).__name__ for step in loader.dataset.pipeline.transforms]
        assert kinds.index('LoadAnnotations') < kinds.index('Resize')
    assert runner.val_dataloader.batch_size == 1
