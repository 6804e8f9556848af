"""Real runs with losses of features: their connectors in training, resumption, test and export."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdistill_ext import cli
from mmdistill_ext.distillers.build import build_model
from tests import (
    forked_runs,
    tiny_seg,
    users_own,  # noqa: F401  (registers them)
)
from tests.runs import ROOT, assert_identical, last, plain_config, run_tool, state_of

LOSSES = dict(
    cwd=dict(type='CWDLoss', tap='backbone.3', connector=dict(type='Conv1x1'), weight=2.0),
    late=dict(
        type='FeatureLoss',
        tap='backbone.2',
        connector=[dict(type='MLP'), dict(type='Norm')],
        weight_by='labels',
        begin=2,
    ),
    user=dict(type='Growing', tap='backbone.1', connector=dict(type='Gated')),
    gap=dict(type='LogitGap', weight=0.1),
    sel=dict(type='SelectiveLoss', temperature=2.0),
)
TRAINED = {'cwd', 'late', 'user', 'gap'}


def distilled(root, work_dir, teacher, **hooks):
    cfg = tiny_seg.distil(plain_config(root, work_dir), teacher, **hooks)
    cfg.model.losses = Config(LOSSES)._cfg_dict
    cfg.custom_imports.imports.append('tests.users_own')
    return cfg


def test_connectors_are_trained_resumed_and_averaged(root, teacher, tmp_path):
    ema = dict(type='EMAHook', momentum=0.1)
    whole = distilled(root, tmp_path / 'whole', teacher, a=ema)
    Runner.from_cfg(whole).train()
    part = distilled(root, tmp_path / 'part', teacher, a=ema)
    part.resume, part.load_from = True, str(tmp_path / 'whole' / 'iter_2.pth')
    Runner.from_cfg(part).train()
    states = [state_of(tmp_path / name / 'iter_4.pth') for name in ('whole', 'part')]
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert_identical(*(state[key] for state in states))

    early = state_of(tmp_path / 'whole' / 'iter_2.pth')['ema_state_dict']
    late = states[0]['ema_state_dict']
    keys = [key for key in states[0]['state_dict'] if key.startswith('connectors.')]
    assert {key.split('.')[1] for key in keys} == TRAINED
    assert {'connectors.user.loss.steps', 'connectors.user.levels.0.0.gate'} < set(keys)
    assert {f'module.{key}' for key in keys} < late.keys()
    moved = ('late.levels.0.0.0.weight', 'user.levels.0.0.gate', 'user.loss.scale')
    for key in (f'module.connectors.{name}' for name in (*moved, 'gap.loss.conv.weight')):
        assert not torch.equal(early[key], late[key]), key
    plain = Runner.from_cfg(plain_config(root, tmp_path / 'plain')).model.state_dict()
    assert states[0]['state_dict'].keys() - set(keys) == plain.keys()


def test_two_processes_equal_one_with_the_same_global_batch(root, teacher, tmp_path):
    cfg = distilled(root, tmp_path / 'one', teacher)
    cfg.model.student.backbone.norm_eval = True
    cfg.model.student.decode_head.norm_cfg = None
    cfg.model.losses.late.connector = dict(type='MLP')
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
    cfg.pop('experiment_name')
    forked_runs.run(cfg, tmp_path / 'one')
    cfg.train_dataloader.batch_size = 1
    forked_runs.run_two(cfg, tmp_path / 'two')
    one, two = (last(tmp_path / name)['state_dict'] for name in ('one', 'two'))
    assert {key.split('.')[1] for key in one if key.startswith('connectors.')} == TRAINED
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-5, msg=key)


def test_from_training_to_the_shipped_student(root, teacher, tmp_path):
    cfg = distilled(root, tmp_path / 'work', teacher)
    cfg.train_cfg.max_iters = 2
    cfg.model.losses.late.begin = 1
    cfg.dump(tmp_path / 'run.py')
    tool, options = ROOT / 'tools/train.py', ('run.py', '--work-dir', 'work')
    log = run_tool(tool, *options, cwd=tmp_path)
    assert "losses.cwd: student 'backbone.3' [0] (64 channels at stride 8x8) through Conv1x1" in log
    assert re.search(r' loss_cwd: [\d.]+', log)
    assert re.search(r'loss_late: 0\.0+\b', log), log[-3000:]  # until it begins

    more = ('--resume', '--cfg-options', 'train_cfg.max_iters=3')
    log = run_tool(tool, *options, *more, cwd=tmp_path)
    assert 'resumed epoch' in log
    assert re.search(r'loss_late: 0\.\d*[1-9]', log)

    shutil.move(teacher, tmp_path / 'away.pth')
    try:
        command = (ROOT / 'tools/test.py', 'run.py', 'work/iter_2.pth', '--work-dir', 'test')
        first = run_tool(*command, cwd=tmp_path)
        export = (ROOT / 'tools/export_student.py', 'run.py', 'work/iter_2.pth', 'out')
        run_tool(*export, cwd=tmp_path)
    finally:
        shutil.move(tmp_path / 'away.pth', teacher)
    state = torch.load(tmp_path / 'out/student.pth', weights_only=True)['state_dict']
    assert state.keys() == build_model(tiny_seg.model(8)).state_dict().keys()

    import mmseg

    tool = Path(mmseg.__file__).parent / '.mim/tools/test.py'
    second = run_tool(tool, 'out/student.py', 'out/student.pth', '--work-dir', 'x', cwd=tmp_path)
    scores = [re.findall(r'(aAcc|mIoU|mAcc): ([\d.]+)', log) for log in (first, second)]
    assert len(scores[0]) == 3
    assert scores[0] == scores[1]


def test_resuming_without_the_connectors_is_refused(root, teacher, tmp_path):
    plain = plain_config(root, tmp_path / 'plain', iterations=2)
    Runner.from_cfg(plain).train()
    cfg = distilled(root, tmp_path / 'work', teacher)
    cfg.dump(tmp_path / 'run.py')
    shutil.copytree(tmp_path / 'plain', tmp_path / 'work')
    with pytest.raises(AssertionError, match=r'missing keys \(e.g. connectors\.'):
        run_tool(ROOT / 'tools/train.py', 'run.py', '--work-dir', 'work', '--resume', cwd=tmp_path)
    load = ('--cfg-options', f'load_from={tmp_path}/plain/iter_2.pth')
    run_tool(ROOT / 'tools/train.py', 'run.py', '--work-dir', 'new', *load, cwd=tmp_path)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ('name', 'data', 'teacher', 'losses'),
    [
        (
            'cwd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
            'camvid',
            'camvid_fpn-r18.pth',
            {'loss_neck', 'loss_logits'},
        ),
        (
            'feature_retinanet_r18_retinanet_r18-w16_8e_bccd-320x240.py',
            'bccd',
            'bccd_retinanet-r18.pth',
            {'loss_neck'},
        ),
    ],
)
def test_configs_train_on_real_data(name, data, teacher, losses, data_root, models_root, tmp_path):
    options = {
        'data_root': str(data_root / data),
        'model.teacher.checkpoint': str(models_root / teacher),
        'train_dataloader.dataset.indices': 8,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'custom_hooks.0.check_labels': 20,
        'default_hooks.logger.interval': 1,
        'val_dataloader': None,
        'val_evaluator': None,
        'val_cfg': None,
        'work_dir': str(tmp_path),
        'experiment_name': tmp_path.name,
    }
    length = dict(camvid={'train_cfg.max_iters': 2}, bccd={'train_cfg.max_epochs': 1})[data]
    cfg = cli.load_config(str(ROOT / 'configs/features' / name), options | length)
    cfg.train_cfg.pop('val_interval', None)
    cfg.train_cfg.pop('val_begin', None)
    runner = Runner.from_cfg(cfg)
    runner.train()
    history = {key: hist.current() for key, hist in runner.message_hub.log_scalars.items()}
    assert {f'train/{loss}' for loss in losses} <= history.keys()
    assert all(0 < history[f'train/{loss}'] < 100 for loss in losses)
    assert history['train/loss'] < 100
