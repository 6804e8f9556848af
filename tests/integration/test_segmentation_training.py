"""Real runs of the selective teacher on tiny data, through a Runner and through the tools."""

import re
import shutil
from pathlib import Path

import torch
from mmengine.runner import Runner

from tests import tiny_seg
from tests.runs import ROOT, assert_identical, free_port, plain_config, run_tool, state_of


def test_weight_0_trains_bit_identically_to_the_plain_config(root, teacher, tmp_path):
    plain = plain_config(root, tmp_path / 'plain')
    distilled = tiny_seg.distil(plain_config(root, tmp_path / 'distilled'), teacher)
    distilled.model.losses.sel.weight = 0.0
    for cfg in (plain, distilled):
        Runner.from_cfg(cfg).train()
    states = [state_of(tmp_path / name / 'iter_4.pth') for name in ('plain', 'distilled')]
    for part in ('state_dict', 'optimizer'):
        assert_identical(*(state[part] for state in states))


def test_resumed_run_equals_an_uninterrupted_one(root, teacher, tmp_path):
    ema = dict(type='EMAHook', momentum=0.1)
    share = dict(type='mmdistill_ext.TeacherShareHook', interval=2)
    whole = tiny_seg.distil(plain_config(root, tmp_path / 'whole'), teacher, a=ema, b=share)
    Runner.from_cfg(whole).train()
    part = tiny_seg.distil(plain_config(root, tmp_path / 'part'), teacher, a=ema, b=share)
    part.resume, part.load_from = True, str(tmp_path / 'whole' / 'iter_2.pth')
    Runner.from_cfg(part).train()
    states = [state_of(tmp_path / name / 'iter_4.pth') for name in ('whole', 'part')]
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert_identical(*(state[key] for state in states))
    plain_keys = state_of(tmp_path / 'whole' / 'iter_4.pth')['state_dict'].keys()
    model = Runner.from_cfg(plain_config(root, tmp_path / 'plain')).model
    assert plain_keys == model.state_dict().keys()


def test_two_processes_equal_one_with_the_same_global_batch(root, teacher, tmp_path):
    cfg = tiny_seg.distil(plain_config(root, tmp_path / 'one'), teacher)
    cfg.model.student.backbone.norm_eval = True
    cfg.model.student.decode_head.norm_cfg = None
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
    cfg.pop('experiment_name')
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    cfg.dump(tmp_path / 'one.py')
    run_tool(ROOT / 'tools/train.py', 'one.py', '--work-dir', 'one', cwd=tmp_path)

    cfg.train_dataloader.batch_size = 1
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    cfg.dump(tmp_path / 'two.py')
    launch = ('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}')
    tool = (ROOT / 'tools/train.py', 'two.py', '--work-dir', 'two', '--launcher', 'pytorch')
    run_tool(*launch, *tool, cwd=tmp_path)

    one, two = (state_of(tmp_path / name / 'iter_4.pth')['state_dict'] for name in ('one', 'two'))
    start = Runner.from_cfg(plain_config(root, tmp_path / 'start')).model.state_dict()
    assert not torch.equal(one['decode_head.conv_seg.weight'], start['decode_head.conv_seg.weight'])
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-5, msg=key)


def test_from_training_to_the_shipped_student(root, teacher, tmp_path):
    """Train, test, export, and test again with mmseg's own tool: the metrics are the same."""
    cfg = tiny_seg.distil(plain_config(root, tmp_path / 'work', iterations=2), teacher)
    cfg.dump(tmp_path / 'run.py')
    log = run_tool(ROOT / 'tools/train.py', 'run.py', '--work-dir', 'work', cwd=tmp_path)
    assert 'eta:' in log
    assert 'decode.loss_sel:' in log
    assert 'decode.loss_ce:' in log

    Path(teacher).rename(tmp_path / 'away.pth')  # testing needs no teacher
    try:
        command = (ROOT / 'tools/test.py', 'run.py', 'work/iter_2.pth', '--work-dir', 'test')
        first = run_tool(*command, cwd=tmp_path)
        export = (ROOT / 'tools/export_student.py', 'run.py', 'work/iter_2.pth', 'out')
        run_tool(*export, cwd=tmp_path)
    finally:
        shutil.move(tmp_path / 'away.pth', teacher)

    import mmseg

    tool = Path(mmseg.__file__).parent / '.mim/tools/test.py'
    second = run_tool(tool, 'out/student.py', 'out/student.pth', '--work-dir', 'x', cwd=tmp_path)
    scores = [re.findall(r'(aAcc|mIoU|mAcc): ([\d.]+)', log) for log in (first, second)]
    assert len(scores[0]) == 3
    assert scores[0] == scores[1]
