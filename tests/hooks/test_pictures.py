"""Pictures come after checkpoints, and an error of one costs the picture only."""

import errno
import logging
from pathlib import Path

import pytest
from mmengine.runner import Runner

from mmdistill_ext.hooks import (
    box_comparison_hook,
    collaboration_hook,
    contrast_mask_hook,
    fit_hook,
    pictures,
)
from mmdistill_ext.hooks.pictures import Pictures
from tests import tiny_boxes, tiny_seg
from tests.tiny_collaboration import SECONDS
from tests.tiny_collaboration import config as collaborative


@pytest.fixture
def said(monkeypatch):
    """What the guard of the pictures says."""
    found = []
    monkeypatch.setattr(
        pictures, 'print_log', lambda text, **options: found.append((text, options))
    )
    return found


@pytest.mark.parametrize(
    'error', [OSError(errno.ENOSPC, 'No space left'), ValueError('x'), MemoryError()]
)
def test_the_first_error_is_said(said, error):
    guard = Pictures('FitHook')
    for _ in range(3):
        with guard.guarded():
            raise error
    ((text, options),) = said
    assert text.startswith(f'FitHook could not draw: {error!r}')
    assert options['level'] == logging.WARNING
    with guard.guarded():
        drawn = True
    assert drawn


def test_an_interruption_is_let_through(said):
    with pytest.raises(KeyboardInterrupt), Pictures('FitHook').guarded():
        raise KeyboardInterrupt
    assert not said


def distilled(root: Path, work_dir: Path):
    weights = tiny_seg.save_weights(root / 't.pth', tiny_seg.model(16), seed=1)
    hooks = dict(
        fit=dict(type='mmdistill_ext.FitHook', interval=1, batches=2),
        masks=dict(type='mmdistill_ext.ContrastMaskHook', interval=1),
    )
    cfg = tiny_seg.distil(tiny_seg.config(root, work_dir), weights, **hooks)
    cfg.model.fit = dict(function=dict(type='ExponentialFit', b=10.0))
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1)
    return cfg


def together(root: Path, work_dir: Path):
    cfg = collaborative(root, work_dir, SECONDS['MinLoss'])
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=2, save_best='ensemble/mIoU'
    )
    return cfg


def detected(root: Path, work_dir: Path):
    cfg = tiny_boxes.config(work_dir / 'data', dict(max_images=2))
    cfg.work_dir = str(work_dir)
    cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP'
    return cfg


@pytest.mark.parametrize(
    ('make', 'drawn', 'first', 'last'),
    [
        (
            distilled,
            {fit_hook: 'plot_fit', contrast_mask_hook: 'write_png'},
            'iter_1.pth',
            'iter_2.pth',
        ),
        (together, {collaboration_hook: 'plot_networks'}, 'best_ensemble_*.pth', 'iter_4.pth'),
        (detected, {box_comparison_hook: 'write_png'}, 'best_coco_*.pth', 'iter_2.pth'),
    ],
    ids=['fit and contrast', 'collaboration', 'boxes'],
)
def test_a_full_disk_costs_the_pictures_only(
    make, drawn, first, last, said, root, tmp_path, monkeypatch
):
    tried = []

    def fail(*args, name, **kwargs):
        tried.append((name, any(tmp_path.glob(first))))
        raise OSError(errno.ENOSPC, 'No space left on device')

    for module, name in drawn.items():
        monkeypatch.setattr(
            module, name, lambda *args, name=name, **kwargs: fail(*args, name=name, **kwargs)
        )
    cfg = make(root, tmp_path)
    tiny_seg.forget_runs()
    Runner.from_cfg(cfg).train()
    assert {name for name, _ in tried} == set(drawn.values())
    assert len(tried) > len(drawn)  # it goes on trying
    assert all(saved for _, saved in tried)
    assert any(tmp_path.glob(last))
    assert len(said) == len(drawn)
    assert all('No space left' in text for text, _ in said)
