"""The CamVid configs on the real images, with the real teachers: two iterations of each."""

import math
from pathlib import Path

import pytest
from mmengine.runner import Runner

from mmdistill_ext import cli

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.real_data
@pytest.mark.parametrize(
    ('config', 'teacher'),
    [
        ('kd/kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py', 'camvid_fpn-r18.pth'),
        ('kd/dkd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py', 'camvid_fpn-r18.pth'),
        ('selective/sel_fpn_r18_fpn_r18-w16_600_camvid-192x256.py', 'camvid_fpn-r18_weak.pth'),
        ('fit/fit-kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py', 'camvid_fpn-r18.pth'),
        ('fit/fit-sel_fpn_r18_fpn_r18-w16_1200_camvid13-192x256.py', 'camvid_fpn-r18_weak.pth'),
    ],
)
def test_trains_and_validates(config, teacher, data_root, models_root, tmp_path):
    options = {
        'data_root': str(data_root / 'camvid'),
        'model.teacher.checkpoint': str(models_root / teacher),
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'val_dataloader.dataset.indices': 3,
        'default_hooks.logger.interval': 1,
        'custom_hooks.0.check_labels': 20,
        'custom_hooks.1.interval': 1,
        'custom_hooks.2.interval': 2,
        'custom_hooks.3.interval': 2,
        'custom_hooks.3.check_labels': 5,
        'work_dir': str(tmp_path),
        'experiment_name': tmp_path.name,
    }
    if not config.startswith('fit/'):
        options = {k: v for k, v in options.items() if not k.startswith('custom_hooks.3')}
    cfg = cli.load_config(str(CONFIGS / config), options)
    runner = Runner.from_cfg(cfg)
    runner.train()
    history = {key: hist.current() for key, hist in runner.message_hub.log_scalars.items()}
    assert math.isfinite(history['train/loss'])
    (name,) = cfg.model.losses
    assert 0.5 < history[f'train/teacher_better/{name}'] <= 1  # an untrained student
    assert 0 <= history['val/mIoU'] < 50
    if config.startswith('fit/'):
        assert history['train/fit/error'] == pytest.approx(
            history['train/fit/train_gt_loss_eval'] - history['train/fit/val_gt_loss']
        )
        assert 0.5 < history['train/fit/simple_share'] < 1  # a trained teacher
    assert len(list(tmp_path.glob('*/vis_data/contrast_masks/iter_2/*/*.png'))) == 4
