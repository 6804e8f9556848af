"""The BCCD configs on the real images, with the real teachers: two iterations of each."""

import math
from pathlib import Path

import pytest
from mmengine.runner import Runner

from mmdistill_ext import cli

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.real_data
@pytest.mark.parametrize('method', ['kd', 'sel'])
@pytest.mark.parametrize('head', ['retinanet', 'gfl'])
def test_trains_and_validates(method, head, data_root, models_root, tmp_path):
    folder = dict(kd='kd', sel='selective')[method]
    config = f'{folder}/{method}_{head}_r18_{head}_r18-w16_8e_bccd-320x240.py'
    options = {
        'data_root': str(data_root / 'bccd'),
        'model.teacher.checkpoint': str(models_root / f'bccd_{head}-r18.pth'),
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 1,
        'train_dataloader.dataset.indices': 8,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'default_hooks.logger.interval': 1,
        'custom_hooks.0.check_teacher': method == 'sel',
        'custom_hooks.1.interval': 1,
        'custom_hooks.2.interval': 2,
        'work_dir': str(tmp_path),
        'experiment_name': tmp_path.name,
    }
    if method == 'sel':  # as its own config's validation says
        options['custom_hooks.0.floor.bbox_mAP'] = dict(retinanet=0.44, gfl=0.28)[head]
    cfg = cli.load_config(str(CONFIGS / config), options)
    runner = Runner.from_cfg(cfg)
    runner.train()
    history = {key: hist.current() for key, hist in runner.message_hub.log_scalars.items()}
    assert math.isfinite(history['train/loss'])
    assert history[f'train/bbox.loss_{method}'] > 0
    assert history[f'train/bbox.loss_{method}_box'] > 0
    assert 0 < history[f'train/teacher_better/{method}'] < 1
    assert history[f'train/teacher_better/{method}/RBC'] > 0.5  # an untrained student
    masks = list(tmp_path.glob('*/vis_data/contrast_masks/iter_2/*/*.png'))
    assert len(masks) == 4 * 5
