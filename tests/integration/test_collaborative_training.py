"""Real runs of several networks that teach each other, through a Runner and through the tools."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from tests import tiny_det, tiny_seg
from tests.runs import (
    ROOT,
    assert_identical,
    free_port,
    logged,
    metrics_of_test,
    run_tool,
    state_of,
    train,
)
from tests.tiny_collaboration import (
    PER_NETWORK,
    SECONDS,
    VIEWS,
    add_views,
    config,
    detectors,
    networks_of,
    validations,
)


@pytest.fixture(scope='module')
def run(root, tmp_path_factory):
    """A whole run by the tool, with everything that several networks can have."""
    folder = tmp_path_factory.mktemp('run')
    cfg = config(root, folder / 'work', SECONDS['ValidationWeighted'], iterations=6)
    add_views(cfg.train_dataloader.dataset.pipeline, VIEWS)
    cfg.optim_wrapper = PER_NETWORK
    cfg.param_scheduler = dict(
        a=[dict(type='PolyLR', power=0.9, by_epoch=False, end=6)],
        b=[dict(type='ConstantLR', factor=0.5, by_epoch=False, end=3)],
    )
    cfg.default_hooks.checkpoint.save_best = ['b/mIoU', 'ensemble/mIoU']
    cfg.dump(folder / 'run.py')
    tiny_seg.tool('train')(folder / 'run.py')
    return folder


@pytest.mark.parametrize('checkpoint', ['iter_6.pth', 'best_ensemble_mIoU_iter_*.pth'])
def test_a_test_finds_what_the_validation_found(run, tmp_path, checkpoint):
    """Also of the ensemble, whose weights change with every validation."""
    (checkpoint,) = (run / 'work').glob(checkpoint)
    iteration = int(checkpoint.stem.rpartition('_')[2])
    tiny_seg.tool('test')(run / 'run.py', checkpoint, '--work-dir', tmp_path)
    found = metrics_of_test(tmp_path)
    before = validations(run / 'work')[iteration // 2 - 1]
    names = [f'{name}/{metric}' for name in ('a', 'b', 'ensemble') for metric in ('mIoU', 'aAcc')]
    assert {name: found[name] for name in names} == {name: before[name] for name in names}


def test_every_network_is_shipped_alone(run, tmp_path, capsys):
    last = validations(run / 'work')[-1]
    for name in ('a', 'b'):
        out = tmp_path / name
        export = (run / 'run.py', run / 'work/iter_6.pth', out, '--network', name)
        tiny_seg.tool('export_student')(*export)
        text = (out / 'student.py').read_text()
        assert 'mmdistill_ext' not in text
        assert not {'MakeViews', 'NetworksEvaluator', 'CollaborationHook'} & set(text.split("'"))
        plain = Config.fromfile(out / 'student.py')
        assert plain.optim_wrapper.to_dict() == PER_NETWORK[name]
        assert plain.param_scheduler[0].type == dict(a='PolyLR', b='ConstantLR')[name]
        assert plain.default_hooks.checkpoint.save_best == ['mIoU']
        test = ('--work-dir', tmp_path / f'test_{name}')
        tiny_seg.tool('test')(out / 'student.py', out / 'student.pth', *test)
        assert metrics_of_test(tmp_path / f'test_{name}')['mIoU'] == last[f'{name}/mIoU']


def test_the_shipped_config_trains_alone(run, tmp_path):
    export = (run / 'run.py', run / 'work/iter_6.pth', tmp_path, '--network', 'b')
    tiny_seg.tool('export_student')(*export)
    options = ('--cfg-options', f'load_from={tmp_path}/student.pth', 'train_cfg.max_iters=2')
    run_tool(
        *(ROOT / 'tools/train.py', 'student.py', '--work-dir', 'alone', *options), cwd=tmp_path
    )
    (best,) = (tmp_path / 'alone').glob('best_mIoU_iter_2.pth')
    assert set(state_of(best)['state_dict']) == set(
        state_of(tmp_path / 'student.pth')['state_dict']
    )


def test_the_best_is_that_of_the_checkpoints_last_validation(run, tmp_path):
    record = networks_of(run / 'work')
    assert list(record) == ['2', '4', '6']
    checkpoints = [run / f'work/iter_{i}.pth' for i in record]
    checkpoints += sorted((run / 'work').glob('best_*.pth'))
    assert len(checkpoints) == 5
    for checkpoint in checkpoints:
        iteration = checkpoint.stem.rpartition('_')[2]
        scores = record[iteration]['scores']
        best = max(('a', 'b'), key=scores.get)
        out = tmp_path / checkpoint.stem
        export = (run / 'run.py', checkpoint, out, '--network', 'best')
        tiny_seg.tool('export_student')(*export)
        shipped = state_of(out / 'student.pth')['state_dict']
        whole = state_of(checkpoint)['state_dict']
        assert len(shipped) > 50
        for key, value in shipped.items():
            assert torch.equal(value, whole[f'students.{best}.{key}']), key


def test_the_log_has_every_term(run):
    first = logged(run / 'work')[0]
    assert {'a/loss_ce', 'b/loss_ce', 'a/loss_kl', 'b/loss_kl', 'ensemble/loss'} <= set(first)
    assert validations(run / 'work')[-1]['weight/a'] > 0


@pytest.mark.parametrize(
    ('second', 'by_epoch', 'per_network', 'buffers'),
    [
        ('MinLoss', False, True, False),
        ('ValidationWeighted', False, False, True),
        ('ValidationWeighted', True, True, False),
        ('General', False, True, True),
        ('General', True, False, False),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(
    root, tmp_path, second, by_epoch, per_network, buffers
):
    """The checkpoint was written before the validation that its networks' weights come from."""

    def run_config(name):
        cfg = config(root, tmp_path / name, SECONDS[second])
        if by_epoch:  # of two iterations
            cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
            cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
            cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
            cfg.log_processor = dict(by_epoch=True)
        else:
            cfg.train_cfg.max_iters = 6
        cfg.param_scheduler[0].end = 6
        if per_network:
            cfg.optim_wrapper = PER_NETWORK
        cfg.default_hooks.checkpoint.save_best = 'b/mIoU'
        ema = dict(type='EMAHook', momentum=0.3, update_buffers=buffers)
        cfg.custom_hooks.insert(int(buffers), ema)  # before and after ours
        return cfg

    train(run_config('whole'))
    part = run_config('part')
    checkpoint = 'epoch_2.pth' if by_epoch else 'iter_4.pth'
    part.resume, part.load_from = True, str(tmp_path / 'whole' / checkpoint)
    train(part)
    last = 'epoch_3.pth' if by_epoch else 'iter_6.pth'
    whole, part = (state_of(tmp_path / name / last) for name in ('whole', 'part'))
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert_identical(whole[key], part[key])
    assert whole['param_schedulers'] == part['param_schedulers']
    record, again = networks_of(tmp_path / 'whole'), networks_of(tmp_path / 'part')
    repeated = second != 'MinLoss'
    assert again == {i: record[i] for i in (('4', '6') if repeated else ('6',))}
    weights = whole['state_dict']['weights']
    assert torch.equal(weights, whole['ema_state_dict']['module.weights'])
    assert torch.equal(weights, torch.tensor([*record['4']['weights'].values()]))
    assert bool((weights != 0.5).all()) == repeated


def test_a_run_that_was_cut_off_in_its_validation_goes_on(root, tmp_path):
    """The repeated validation may be the first to find a best network, and save it."""
    train(config(root, tmp_path / 'cut', SECONDS['General'], iterations=2))
    cfg = config(root, tmp_path / 'on', SECONDS['General'])
    cfg.default_hooks.checkpoint.save_best = 'b/mIoU'
    cfg.resume, cfg.load_from = True, str(tmp_path / 'cut/iter_2.pth')
    train(cfg)
    assert list(networks_of(tmp_path / 'on')) == ['2', '4']
    assert len(list((tmp_path / 'on').glob('best_b_mIoU_iter_*.pth'))) == 1


def test_a_later_interval_of_validation_is_known_to_a_resumed_run(root, tmp_path):
    """At iteration 2 no validation stood before the checkpoint, by the later interval it does."""
    for name in ('whole', 'part'):
        cfg = config(root, tmp_path / name, SECONDS['General'])
        cfg.train_cfg.update(val_interval=4, dynamic_intervals=[(2, 2)])
        if name == 'part':
            cfg.resume, cfg.load_from = True, str(tmp_path / 'whole/iter_2.pth')
        train(cfg)
    whole, part = (state_of(tmp_path / name / 'iter_4.pth') for name in ('whole', 'part'))
    assert_identical(whole['state_dict'], part['state_dict'])
    assert (whole['state_dict']['weights'] != 0.5).all()
    assert networks_of(tmp_path / 'whole') == networks_of(tmp_path / 'part')


SEVERAL_RUNS = """
import os, sys
from mmengine.config import Config
from mmdistill_ext import cli

for path in sys.argv[1:]:
    cfg = Config.fromfile(path)
    cfg.launcher = 'pytorch'
    cli.use_gloo(cfg)
    cli.build_runner(cfg).train()
cli.leave_process_group()
sys.stdout.flush()
os._exit(0)  # not to be aborted by threads of gloo that the ended runs left
"""


def without_statistics(root, work_dir, second, per_network, sequential):
    """Four images at a time, and no statistics of a process's own share of them."""
    cfg = config(root, work_dir, SECONDS[second])
    for network in cfg.model.students.values():
        network.backbone.norm_cfg = network.decode_head.norm_cfg = tiny_det.GN
    cfg.model.sequential_backward = sequential
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    cfg.log_processor = dict(by_epoch=True)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
    if per_network:
        cfg.optim_wrapper = PER_NETWORK
        cfg.optim_wrapper.b.optimizer = dict(type='SGD', lr=0.03)
        cfg.optim_wrapper.a.accumulative_counts = cfg.optim_wrapper.b.accumulative_counts = 2
    cfg.experiment_name = work_dir.name
    return cfg


def test_two_processes_equal_one_with_the_same_global_batch(root, tmp_path):
    """The weights are the same although each process validates and measures on its own images."""
    settings = dict(
        MinLoss=dict(per_network=False, sequential=True),
        ValidationWeighted=dict(per_network=True, sequential=False),
        General=dict(per_network=False, sequential=False),
    )
    for second, setting in settings.items():
        train(without_statistics(root, tmp_path / f'{second}_one', second, **setting))
        cfg = without_statistics(root, tmp_path / f'{second}_two', second, **setting)
        cfg.train_dataloader.batch_size = 1
        cfg.custom_hooks[0].batches = 1
        cfg.dump(tmp_path / f'{second}.py')
    (tmp_path / 'runs.py').write_text(SEVERAL_RUNS)
    launch = ('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}')
    run_tool(*launch, 'runs.py', *(f'{second}.py' for second in settings), cwd=tmp_path)
    for second in settings:
        folders = [tmp_path / f'{second}_{name}' for name in ('one', 'two')]
        one, two = (state_of(folder / 'epoch_2.pth')['state_dict'] for folder in folders)
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-5, msg=key)
        assert bool((one['weights'] != 0.5).all()) == (second != 'MinLoss')
        for mine, its in zip(*(networks_of(folder).values() for folder in folders), strict=True):
            assert mine['scores'] == pytest.approx(its['scores'], abs=0.02)  # percent, rounded


@pytest.mark.parametrize('second', ['MinLoss', 'Linear', 'MinLogit', 'General'])
def test_mixed_precision_gives_the_losses_of_full_precision(root, tmp_path, second):
    cfg = config(root, tmp_path, dict(type=second))
    tiny_seg.forget_runs()
    runner = Runner.from_cfg(cfg)
    model = runner.model.train()
    model.has_hook = True
    batch = model.data_preprocessor(next(iter(runner.train_dataloader)), True)
    found = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses = model(**batch, mode='loss')
        model.zero_grad()
        model.parse_losses(losses)[0].backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
        found.append({key: x.item() for key, x in losses.items() if 'loss' in key})
    assert found[0] != found[1]
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], rel=0.05, abs=0.01)


def test_detectors_learn_together_and_are_shipped_alone(coco, tmp_path):
    cfg = detectors(coco, tmp_path / 'work')
    cfg.dump(tmp_path / 'run.py')
    tiny_seg.tool('train')(tmp_path / 'run.py')
    first, last = logged(tmp_path / 'work')[0], validations(tmp_path / 'work')[-1]
    assert {'a/loss_bbox', 'b/loss_dfl', 'a/loss_kl', 'b/loss_kl', 'ensemble/loss'} <= set(first)
    record = networks_of(tmp_path / 'work')
    entry = record[max(record, key=int)]
    assert entry['metric'] == 'coco/bbox_mAP'
    assert entry['scores']['a'] == last['a/coco/bbox_mAP']
    assert sum(entry['weights'].values()) == pytest.approx(1)
    assert entry['weights']['a'] != 0.5

    checkpoint = tmp_path / 'work/epoch_2.pth'
    tiny_seg.tool('test')(tmp_path / 'run.py', checkpoint, '--work-dir', tmp_path / 'test')
    together = metrics_of_test(tmp_path / 'test')
    for name in ('a', 'b'):
        out = tmp_path / name
        export = (tmp_path / 'run.py', checkpoint, out, '--network', name)
        tiny_seg.tool('export_student')(*export)
        assert 'mmdistill_ext' not in (out / 'student.py').read_text()
        test = ('--work-dir', tmp_path / f'test_{name}')
        tiny_seg.tool('test')(out / 'student.py', out / 'student.pth', *test)
        alone = {k: v for k, v in metrics_of_test(tmp_path / f'test_{name}').items() if '/' in k}
        assert len(alone) > 6
        assert alone['pascal_voc/mAP'] > 0
        assert alone == {k: together[f'{name}/{k}'] for k in alone}


def test_detectors_resume(coco, tmp_path):
    """Their views are random, the validation that is repeated is not."""
    train(detectors(coco, tmp_path / 'whole'))
    part = detectors(coco, tmp_path / 'part')
    part.resume, part.load_from = True, str(tmp_path / 'whole/epoch_1.pth')
    train(part)
    whole, part = (networks_of(tmp_path / name) for name in ('whole', 'part'))
    assert len(whole) == 2
    assert part[min(part, key=int)]['weights'] == whole[min(whole, key=int)]['weights']
