"""What the measuring hook refuses and does; whole runs are in integration/test_fit_training.py."""

import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmdistill_ext.hooks import FitHook
from tests import tiny_seg

FIT = dict(function=dict(type='ExponentialFit', b=10.0))


@pytest.fixture(scope='module')
def data(root):
    tiny_seg.save_weights(root / 't.pth', tiny_seg.model(16), seed=1)
    return root


@pytest.fixture
def cfg(data, tmp_path):
    tiny_seg.forget_runs()
    plain = tiny_seg.config(data, tmp_path / 'work')
    plain.default_hooks.pop('visualization')
    cfg = tiny_seg.distil(
        plain, str(data / 't.pth'), fit=dict(type='mmdistill_ext.FitHook', interval=1, batches=2)
    )
    cfg.model.fit = FIT
    return cfg


def history(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return next(hook for hook in runner.hooks if isinstance(hook, FitHook)).state.history


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), r'`FitHook.interval` should be an integer >= 1. Found 0'),
        (dict(batches=0), r'`FitHook.batches` should be an integer >= 1. Found 0'),
        (dict(batches=2.5), r'`FitHook.batches` should be an integer. Found 2.5'),
        (dict(window=0), r'`FitHook.window` should be an integer >= 1. Found 0'),
        (dict(check_labels=-1), r'`FitHook.check_labels` should be an integer >= 0. Found -1'),
    ],
)
def test_impossible_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        FitHook(**arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=1), r'`FitHook.interval` should .* \(FIT-2\). Found 1 iteration of 1 image'),
        (dict(interval=4, window=1), r'`FitHook.window` should .* Found 1 iteration of 1 image'),
        (dict(interval=4, begin=3), r'`FitHook.interval` .* of 1 image .*, at iteration 4'),
        (dict(interval=2, batches=1), r'`FitHook.batches` .*Found batches=1, 1 images .*val'),
    ],
)
def test_a_mean_over_one_image_is_refused(cfg, arguments, message):
    """FIT-2: M, N > 1."""
    cfg.train_dataloader.batch_size = 1
    cfg.custom_hooks[0].update(arguments)
    with pytest.raises(ValueError, match=message):
        history(cfg)


def test_data_of_one_image_are_refused(cfg):
    cfg.val_dataloader.dataset.indices = [0]
    with pytest.raises(ValueError, match=r'`FitHook.batches` .*, 2 images .*, of which .* 1'):
        history(cfg)


@pytest.mark.parametrize('arguments', [dict(interval=2), dict(interval=1, measure_train=True)])
def test_a_mean_over_two_images_is_one(cfg, arguments):
    cfg.train_dataloader.batch_size = 1
    cfg.custom_hooks[0].update(arguments)
    assert all('error' in row for row in history(cfg))


def test_no_validation_data(cfg):
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    with pytest.raises(ValueError, match=r'`val_dataloader` should be the config of a loader with'):
        history(cfg)


def test_no_validation_labels(cfg):
    cfg.val_dataloader.dataset.pipeline.pop(1)
    with pytest.raises(ValueError, match=r'`val_dataloader.dataset` should give labels'):
        history(cfg)


def test_missing_label_file(cfg, data, tmp_path):
    shutil.copytree(data, tmp_path / 'data')
    (tmp_path / 'data/ann/val/2.png').unlink()
    cfg.val_dataloader.dataset.data_root = str(tmp_path / 'data')
    with pytest.raises(
        ValueError, match=r'`val_dataloader.dataset` should have a label for.*2.png'
    ):
        history(cfg)


def test_label_outside_the_classes(cfg, data, tmp_path):
    shutil.copytree(data, tmp_path / 'data')
    cv2.imwrite(str(tmp_path / 'data/ann/val/1.png'), np.full((32, 40), 7, np.uint8))
    cfg.val_dataloader.dataset.data_root = str(tmp_path / 'data')
    with pytest.raises(ValueError, match=r"Found \[7\] in '.*1.png': check `val_dataloader.datas"):
        history(cfg)


def test_model_without_the_fit_loss(cfg):
    del cfg.model['fit']
    with pytest.raises(ValueError, match=r'`FitHook` needs a model with the fit loss'):
        history(cfg)


def test_fit_loss_without_the_hook(cfg):
    cfg.custom_hooks = []
    with pytest.raises(ValueError, match=r"Add dict\(type='mmdistill_ext.FitHook'\)"):
        history(cfg)


def test_loss_that_is_not_finite_stops_the_run(cfg, monkeypatch):
    from mmdistill_ext.units.pixel.pair import PixelPair

    monkeypatch.setattr(PixelPair, 'gt_loss', lambda *_: torch.tensor([float('nan'), 1.0]))
    with pytest.raises(ValueError, match=r'FIT, iteration 1: `val_gt_loss` should be finite'):
        history(cfg)


def test_loader_of_ones_own(cfg):
    """Measured on the training images, under the training's labels, but in eval mode."""
    hook = cfg.custom_hooks[0]
    hook.batches, hook.measure_train = 4, True
    hook.dataloader = tiny_seg.dataloader(cfg.train_dataloader.dataset.data_root, 'train')
    hook.dataloader.update(batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))
    for row in history(cfg):  # four images, four batches: both saw all of them
        assert row['val_gt_loss'] == pytest.approx(row['train_gt_loss_eval'], rel=1e-6)
        assert row['error'] == pytest.approx(0, abs=1e-6)


def test_the_beginning_is_left_out(cfg):
    cfg.train_cfg.max_iters = 3
    cfg.custom_hooks[0].update(begin=2, window=3)
    runner = Runner.from_cfg(cfg)
    runner.train()
    state = next(hook for hook in runner.hooks if isinstance(hook, FitHook)).state
    assert [row['iter'] for row in state.history] == [3]
    assert len(state.train) == len(state.measured['val']) == 1


def test_workers_measure_the_same(cfg):
    expected = history(cfg)
    tiny_seg.forget_runs()
    cfg.val_dataloader.update(num_workers=1, persistent_workers=True)
    assert history(cfg) == expected


def test_only_a_resumed_run_takes_the_state(cfg, tmp_path):
    first = history(cfg)
    tiny_seg.forget_runs()
    cfg.load_from = str(tmp_path / 'work/iter_2.pth')
    assert [row['iter'] for row in history(cfg)] == [1, 2]
    tiny_seg.forget_runs()
    cfg.resume, cfg.train_cfg.max_iters = True, 3
    cfg.load_from = str(tmp_path / 'work/iter_2.pth')
    resumed = history(cfg)
    assert [row['iter'] for row in resumed] == [1, 2, 3]
    assert first[:1] != resumed[:1]  # the second run's, from other weights


def test_checkpoint_without_the_state_is_resumed_with_a_warning(cfg, tmp_path, capsys):
    history(cfg)
    path = tmp_path / 'work/iter_2.pth'
    state = torch.load(path, weights_only=False)
    del state['fit']
    torch.save(state, path)
    tiny_seg.forget_runs()
    cfg.resume, cfg.load_from, cfg.train_cfg.max_iters = True, str(path), 3
    assert [row['iter'] for row in history(cfg)] == [3]
    assert 'has no state of the fit loss' in ''.join(capsys.readouterr())
