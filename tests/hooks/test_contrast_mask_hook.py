"""Contrast masks while training."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.runner import Runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdistill_ext.hooks.contrast_mask_hook import ContrastMaskHook
from mmdistill_ext.visualization.contrast import contrast_overlay
from tests import tiny_boxes, tiny_det, tiny_seg


def build_runner(root: Path, **hook: object) -> Runner:
    tiny_seg.forget_runs()
    tiny_seg.write_data(root, 'train')
    teacher = tiny_seg.save_weights(root / 'teacher.pth', tiny_seg.model(16), seed=1)
    cfg = tiny_seg.config(root, root / 'work')
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3)
    cfg.visualizer.vis_backends.append(dict(type='TensorboardVisBackend'))
    cfg = tiny_seg.distil(cfg, teacher, masks=dict(type='mmdistill_ext.ContrastMaskHook', **hook))
    cfg.model.losses.late = dict(type='SelectiveLoss', begin=2)
    return Runner.from_cfg(cfg)


def test_a_run_shows_its_own_comparisons(tmp_path: Path):
    """The second batch holds a smaller image, which was padded; the late loss is still off."""
    values = dict(teacher=200, student=10, void=99)
    runner = build_runner(tmp_path, interval=2, values=values)
    model = runner.model
    loss = model.distillation.losses['sel']
    kept, pop = [], loss.records.pop_contrast
    loss.records.pop_contrast = lambda: kept.append(pop()) or kept[-1]
    forwards, forward = [], model.forward
    model.forward = lambda *args, **kwargs: forwards.append(1) or forward(*args, **kwargs)
    runner.train()

    assert len(forwards) == 3  # none for the pictures
    assert loss.records.keep_contrast is False
    assert len(kept) == 1
    folder = Path(runner.log_dir) / 'vis_data'
    masks = folder / 'contrast_masks'
    written = sorted(str(path.relative_to(masks)) for path in masks.rglob('*.png'))
    assert written == ['iter_2/sel/0_2.png', 'iter_2/sel/1_3.png']
    wins = kept[0].wins
    for i, size in enumerate(tiny_seg.SIZES[2:]):
        mask = cv2.imread(str(masks / f'iter_2/sel/{i}_{i + 2}.png'), cv2.IMREAD_UNCHANGED)
        label = cv2.imread(str(tmp_path / f'ann/train/{i + 2}.png'), 0)
        assert mask.shape == size
        assert np.array_equal(mask == 99, label == 255)
        assert np.array_equal(mask == 200, wins[i, : size[0], : size[1]].numpy())
        image = cv2.imread(str(tmp_path / f'img/train/{i + 2}.png'))[..., ::-1]
        shown = cv2.imread(str(folder / f'vis_image/contrast_sel_{i}_2.png'))[..., ::-1]
        assert np.array_equal(shown, contrast_overlay(image, mask, values))

    events = EventAccumulator(str(next(folder.glob('events.*'))))
    events.Reload()
    assert events.Tags()['images'] == ['contrast_sel_0', 'contrast_sel_1']
    assert [event.step for event in events.Images('contrast_sel_0')] == [2]


@pytest.mark.parametrize('size', [32, 160])
def test_batches_that_are_resized_give_masks_of_the_images(tmp_path: Path, size: int):
    """mmdet's YOLOX configs draw a size for the batches that come next."""
    tiny_seg.forget_runs()
    cfg = tiny_boxes.config(tmp_path / 'data', None)
    resize = dict(type='BatchSyncRandomResize', random_size_range=(size, size), interval=1)
    cfg.model.student.data_preprocessor.batch_augments = [resize]
    cfg.custom_hooks = [dict(type='mmdistill_ext.ContrastMaskHook', interval=2)]
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    folder = Path(runner.log_dir, 'vis_data/contrast_masks/iter_2/sel')
    written = {path.name: cv2.imread(str(path), 0) for path in folder.glob('*.png')}
    assert len(written) == 2 * len(tiny_det.STRIDES)
    for name, mask in written.items():
        place = int(name.partition('cells')[2][0])
        assert mask.shape == tuple(side // 2 for side in tiny_boxes.SIZES[place])


@pytest.mark.parametrize('losses', [['sel', 'at'], ['at']])
def test_unknown_loss_is_named(tmp_path: Path, losses: list[str]):
    runner = build_runner(tmp_path, interval=1, losses=losses)
    with pytest.raises(ValueError, match=r"losses`.*\['late', 'sel'\].*Found \['at'\]"):
        runner.train()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), r'interval` should be >= 1\. Found 0'),
        (dict(max_images=0), r'max_images` should be >= 1\. Found 0'),
        (dict(alpha=1.5), r'alpha` should be in \[0, 1\]\. Found 1\.5'),
        (dict(values=dict(teacher=0)), r'values` should be three different values'),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str):
    with pytest.raises(ValueError, match=r'`ContrastMaskHook\.' + message):
        ContrastMaskHook(**arguments)
