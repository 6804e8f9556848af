"""What the networks take from their validation, and what is refused before it."""

import json
import math
import random
import re
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch.utils.data import ConcatDataset

from mmdistill_ext.hooks import CollaborationHook, collaboration_hook
from mmdistill_ext.hooks.collaboration_hook import check_views
from mmdistill_ext.policies.second_predictions import general, validation_weighted
from mmdistill_ext.transforms import MakeViews
from tests import tiny_seg
from tests.runs import assert_identical, logged, state_of, train
from tests.tiny_collaboration import SECONDS, add_views, config, networks_of

VALIDATION = ('val_dataloader', 'val_evaluator', 'val_cfg')


@pytest.fixture
def said(monkeypatch):
    """What the policies warn of."""
    found = []
    for module in (general, validation_weighted):
        monkeypatch.setattr(module, 'warn', found.append)
    return found


def started(cfg: Config) -> tuple[Runner, CollaborationHook]:
    """A runner that stands at the start of its training, and its hook."""
    tiny_seg.forget_runs()
    runner = Runner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    if runner._val_loop is not None:
        runner._val_loop = runner.build_val_loop(runner._val_loop)
    hook = next(hook for hook in runner.hooks if isinstance(hook, CollaborationHook))
    hook.before_train(runner)
    return runner, hook


def validate(runner: Runner, hook: CollaborationHook, **metrics: float) -> list[float]:
    """Hand the hook the mIoU of each network; return the model's weights."""
    metrics = {f'{name}/mIoU': value for name, value in metrics.items()}
    hook.after_val_epoch(runner, metrics)
    hook.after_val(runner)
    return runner.model.weights.tolist()


@pytest.mark.parametrize('second', ['ValidationWeighted', 'General'])
def test_weights_need_a_validation(root, tmp_path, second):
    cfg = config(root, tmp_path, SECONDS[second])
    for key in VALIDATION:
        cfg.pop(key)
    with pytest.raises(ValueError, match=rf'`second`={second} takes.*`val_dataloader`.*Found none'):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))


def test_weights_by_metric_need_the_metrics_of_every_network(root, tmp_path):
    cfg = config(root, tmp_path, SECONDS['ValidationWeighted'])
    cfg.val_evaluator = cfg.val_evaluator.metrics
    with pytest.raises(ValueError, match=r'NetworksEvaluator.*Found Evaluator\.'):
        train(cfg)


def test_a_metric_that_is_none_names_the_known_ones(root, tmp_path):
    cfg = config(root, tmp_path, {**SECONDS['ValidationWeighted'], 'metric': 'mDice'}, 2)
    known = r"aAcc, mAcc, mIoU\. Found 'mDice'"
    with pytest.raises(ValueError, match=rf'`second\.metric` should be a metric.*{known}'):
        train(cfg)
    cfg = config(root, tmp_path, SECONDS['MinLoss'], 2)
    cfg.custom_hooks[0].metric = 'mDice'
    with pytest.raises(ValueError, match=rf'`CollaborationHook\.metric` should be.*{known}'):
        train(cfg)
    cfg.custom_hooks[0].metric = 'mIoU'
    cfg.val_evaluator = cfg.val_evaluator.metrics
    with pytest.raises(ValueError, match=r"Found 'mIoU', there are none \(see NetworksEvaluator\)"):
        train(cfg)


@pytest.mark.parametrize(
    ('prefix', 'name', 'right'),
    [
        (None, 'a/mIoU', 'mIoU'),
        (None, 'ensemble/mIoU', 'mIoU'),
        ('seg', 'mIoU', 'seg/mIoU'),
        ('seg/val', 'seg/mIoU', 'seg/val/mIoU'),
        ('seg', 'a/seg/mIoU', 'seg/mIoU'),
    ],
)
def test_a_name_that_no_metric_can_have_is_refused_at_start(
    root,
    tmp_path,
    prefix,
    name,
    right,
):
    found = rf"without a network's\. Found '{name}', prefixes are \[.*{prefix}"
    cfg = config(root, tmp_path, {**SECONDS['ValidationWeighted'], 'metric': name})
    cfg.val_evaluator.metrics.prefix = prefix
    with pytest.raises(ValueError, match=r'`second\.metric`.*' + found):
        started(cfg)
    cfg.model.second.metric = right
    started(cfg)
    cfg.custom_hooks[0].metric = name
    with pytest.raises(ValueError, match=r'`CollaborationHook\.metric`.*' + found):
        started(cfg)


def test_a_run_without_scores_for_the_networks_still_trains(root, tmp_path):
    """Nothing depends on them, and the file says that there are none."""
    cfg = config(root, tmp_path, SECONDS['MinLoss'], 2)
    cfg.val_evaluator = cfg.val_evaluator.metrics
    (entry,) = networks_of(train(cfg)).values()
    assert entry['best'] is None
    assert set(entry['scores'].values()) == {None}


def test_a_model_of_one_network_is_refused(root, tmp_path):
    cfg = tiny_seg.config(root, tmp_path)
    cfg.custom_hooks = [dict(type='mmdistill_ext.CollaborationHook')]
    with pytest.raises(ValueError, match=r'needs.*CollaborativeDistiller.*Found EncoderDecoder'):
        train(cfg)


@pytest.mark.parametrize('batches', [0, -1, 1.5, None])
def test_batches_are_counted(batches):
    with pytest.raises(
        ValueError, match=rf'`CollaborationHook\.batches` should be an integer.*{batches}'
    ):
        CollaborationHook(batches=batches)


@pytest.mark.parametrize('names', [['a', 'c'], ['a', 'b', 'c']])
def test_views_of_other_networks_are_refused_at_the_start(root, tmp_path, names):
    cfg = config(root, tmp_path, SECONDS['MinLoss'])
    add_views(cfg.train_dataloader.dataset.pipeline, {name: [] for name in names})
    message = rf"`MakeViews\.views` should be.*\['a', 'b'\]\. Found \['a', '{names[1]}'"
    with pytest.raises(ValueError, match=message):
        train(cfg)


@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        (
            dict(
                type='mmdet.PipelineSwitchHook',
                switch_epoch=1,
                switch_pipeline=[
                    dict(
                        type='mmdistill_ext.MakeViews',
                        views=dict(a=[], c=[]),
                        pack=dict(type='PackSegInputs'),
                    )
                ],
            ),
            r"`MakeViews\.views` should be.*\['a', 'b'\]\. Found \['a', 'c'\]",
        ),
        (dict(type='mmdet.YOLOXModeSwitchHook'), r'`custom_hooks`.*YOLOXModeSwitchHook.*Found one'),
    ],
    ids=['views of others', 'head of one'],
)
def test_hooks_that_change_the_data_late_are_checked_at_the_start(root, tmp_path, hook, message):
    cfg = config(root, tmp_path, SECONDS['MinLoss'])
    cfg.custom_hooks.append(hook)
    import_module('mmdet.engine.hooks')
    with pytest.raises(ValueError, match=message):
        train(cfg)


class Pictures:
    """A data set, or one that mixes the images of another: its pipeline is a list."""

    def __init__(self, pipeline, dataset=None):
        self.pipeline = pipeline
        if dataset is not None:
            self.dataset = dataset

    def __len__(self):
        return 1


def test_views_are_found_inside_of_data_sets_that_wrap_others():
    def repeat(dataset):
        return SimpleNamespace(dataset=dataset, times=2)

    wrong = MakeViews(dict(b=[], c=[]), pack=dict)
    plain, mixed = Pictures([]), Pictures([wrong], Pictures([]))
    for dataset in (
        Pictures([wrong]),
        mixed,
        repeat(Pictures([wrong])),
        repeat(mixed),
        ConcatDataset([plain, Pictures([wrong])]),
    ):
        with pytest.raises(ValueError, match=r"`students`: \['a', 'b'\]\. Found \['b', 'c'\]"):
            check_views(dataset, ['a', 'b'])
    check_views(repeat(mixed), ['c', 'b'])  # names decide, not their order
    check_views(ConcatDataset([plain, plain]), ['a', 'b'])
    with pytest.raises(
        ValueError, match=r'`train_dataloader\.dataset`.*all its data sets or of none'
    ):
        check_views(ConcatDataset([plain, mixed]), ['b', 'c'])


SWITCHED = dict(type='mmdistill_ext.MakeViews', views=dict(c=[], b=[]), pack=dict)


@pytest.mark.parametrize(
    'switched', [SWITCHED, {**SWITCHED, 'type': MakeViews}, MakeViews(dict(b=[], c=[]), pack=dict)]
)
def test_views_of_a_pipeline_that_comes_later_are_checked_too(switched, monkeypatch):
    said = []
    monkeypatch.setattr(collaboration_hook, 'print_log', lambda text, *_: said.append(text))
    dataset = Pictures([MakeViews(dict(b=[], c=[]), pack=dict)])
    check_views(dataset, ['b', 'c'], [[dict(type='Resize'), switched]])
    check_views(Pictures([]), ['b', 'c'], [[]])
    assert not said
    with pytest.raises(ValueError, match=r"\['a', 'b'\]\. Found \['b', 'c'\]"):
        check_views(Pictures([]), ['a', 'b'], [[switched]])
    check_views(dataset, ['b', 'c'], [[dict(type='Resize')]])
    assert 'all networks see the same image' in said[0]


def test_weights_grow_with_the_metric_and_stay_without(root, tmp_path, said):
    runner, hook = started(config(root, tmp_path, SECONDS['ValidationWeighted']))
    assert runner.model.weights.tolist() == [0.5, 0.5]
    weights = validate(runner, hook, a=30.0, b=40.0, ensemble=41.0)
    assert weights[1] / weights[0] == pytest.approx(math.exp((40 - 30) / 5.0), rel=1e-4)
    for other in (dict(a=90.0, b=math.nan), dict(a=90.0), dict(a=90.0, b=math.inf), {}):
        assert validate(runner, hook, **other) == weights
        assert said.pop() == 'Not every network has a mIoU yet: the weights stay.'
    assert not said
    (entry,) = networks_of(tmp_path).values()
    assert entry['best'] is None


def test_a_score_that_is_no_number_cannot_be_the_best(root, tmp_path):
    runner, hook = started(config(root, tmp_path, SECONDS['MinLoss']))
    assert validate(runner, hook, a=math.nan, b=1.0, ensemble=math.nan) == [0.5, 0.5]
    text = (tmp_path / 'networks.json').read_text()
    assert 'NaN' not in text
    assert json.loads(text)['0'] == dict(
        metric='mIoU',
        scores=dict(a=None, b=1.0, ensemble=None),
        weights=dict(a=0.5, b=0.5),
        best='b',
    )


def test_networks_are_compared_by_the_metric_that_is_named(root, tmp_path):
    cfg = config(root, tmp_path, SECONDS['MinLoss'])
    cfg.custom_hooks[0].metric = 'aAcc'
    runner, hook = started(cfg)
    metrics = {'a/mIoU': 3.0, 'b/mIoU': 2.0, 'a/aAcc': 4.0, 'b/aAcc': 5.0, 'ensemble/aAcc': 6.0}
    hook.after_val_epoch(runner, metrics)
    assert networks_of(tmp_path)['0']['best'] == 'b'
    assert networks_of(tmp_path)['0']['metric'] == 'aAcc'


def test_weights_come_from_their_own_metric(root, tmp_path):
    cfg = config(root, tmp_path, SECONDS['ValidationWeighted'])
    cfg.custom_hooks[0].metric = 'aAcc'
    runner, hook = started(cfg)
    hook.after_val_epoch(runner, {'a/mIoU': 30.0, 'b/mIoU': 40.0, 'a/aAcc': 9.0, 'b/aAcc': 5.0})
    hook.after_val(runner)
    first, second = runner.model.weights.tolist()
    assert second / first == pytest.approx(math.exp((40 - 30) / 5.0), rel=1e-4)
    assert networks_of(tmp_path)['0']['best'] == 'a'


@pytest.mark.parametrize(
    ('correlation', 'expected', 'warning'),
    [
        ([[1.0, 0.0], [0.0, 3.0]], [0.75, 0.25], None),
        ([[1.0, 1.0], [1.0, 1.0]], [0.5, 0.5], r'err nearly alike \(condition number.*ridge'),
        ([[0.0, 0.0], [0.0, 0.0]], [0.125, 0.875], 'not finite, or none: the weights stay'),
        ([[1.0, math.nan], [0.0, 3.0]], [0.125, 0.875], 'not finite, or none: the weights stay'),
        ([[math.inf, 0.0], [0.0, 3.0]], [0.125, 0.875], 'not finite, or none: the weights stay'),
    ],
)
def test_weights_by_errors(
    root,
    tmp_path,
    said,
    monkeypatch,
    correlation,
    expected,
    warning,
):
    runner, hook = started(config(root, tmp_path, dict(type='General', ridge=1e-6)))
    runner.model.weights.copy_(torch.tensor([0.125, 0.875]))
    found = torch.tensor(correlation, dtype=torch.float64)
    monkeypatch.setattr(hook._errors, 'measure', lambda runner: found)
    assert validate(runner, hook, a=1.0, b=1.0) == pytest.approx(expected, abs=1e-3)
    assert len(said) == (warning is not None)
    if warning:
        assert re.search(warning, said[0])


def test_networks_that_are_alike_share_the_weight(root, tmp_path, said):
    cfg = config(root, tmp_path, dict(type='General', ridge=1e-6))
    cfg.model.students = dict(a=tiny_seg.model(4), b=tiny_seg.model(4))
    runner, hook = started(cfg)
    networks = runner.model.students
    networks['b'].load_state_dict(networks['a'].state_dict())
    assert validate(runner, hook, a=1.0, b=1.0) == pytest.approx([0.5, 0.5], abs=1e-4)
    assert 'err nearly alike' in said[0]


def test_measuring_disturbs_nothing(root, tmp_path):
    """Weights, statistics, modes, gradients and random numbers are as they were."""
    cfg = config(root, tmp_path, SECONDS['General'])
    cfg.model.students.a.decode_head.dropout_ratio = 0.5
    runner, hook = started(cfg)
    model = runner.model.train()
    model.students['a'].backbone.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    validate(runner, hook, a=1.0, b=2.0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert not torch.equal(before.pop('weights'), after['weights'])
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_errors_are_measured_on_what_the_hook_names(root, tmp_path):
    """All four images: the sum is that of the distiller over the whole data set."""
    cfg = config(root, tmp_path, SECONDS['General'])
    cfg.custom_hooks[0].update(batches=4, dataloader=tiny_seg.dataloader(root, 'train'))
    cfg.custom_hooks[0].dataloader.update(batch_size=1, num_workers=1, persistent_workers=True)
    runner, hook = started(cfg)
    found = hook._errors.measure(runner)
    with DefaultScope.overwrite_default_scope('mmseg'):
        loader = Runner.build_dataloader({**tiny_seg.dataloader(root, 'train'), 'batch_size': 1})
    model = runner.model.eval()
    expected = sum(model.error_correlation(batch) for batch in loader)
    torch.testing.assert_close(found, expected)
    assert hook._errors.measure(runner).equal(found)


def test_held_out_images_need_labels(root, tmp_path):
    cfg = config(root, tmp_path, SECONDS['General'])
    del cfg.val_dataloader.dataset.pipeline[1]
    with pytest.raises(ValueError, match=r'`val_dataloader\.dataset` should give labels'):
        train(cfg)


def test_the_hook_changes_nothing_where_no_weights_are_taken(root, tmp_path):
    for name in ('with', 'without'):
        cfg = config(root, tmp_path / name, SECONDS['MinLoss'])
        if name == 'without':
            cfg.pop('custom_hooks')
        train(cfg)
    states = [state_of(tmp_path / name / 'iter_4.pth') for name in ('with', 'without')]
    for part in ('state_dict', 'optimizer'):
        assert_identical(*(state[part] for state in states))


def test_the_log_shows_the_weights_that_were_found(root, tmp_path):
    folder = train(config(root, tmp_path, SECONDS['General'], 2))
    (line,) = [line for line in logged(folder) if 'weight/a' in line]
    (entry,) = networks_of(folder).values()
    assert {name: line[f'weight/{name}'] for name in ('a', 'b')} == entry['weights']
    assert {name: line[f'{name}/mIoU'] for name in entry['scores']} == entry['scores']
    assert sum(entry['weights'].values()) == pytest.approx(1)
    assert entry['weights']['a'] != 0.5


def test_validating_without_training_is_left_alone(root, tmp_path):
    cfg = config(root, tmp_path, SECONDS['General'])
    tiny_seg.forget_runs()
    runner = Runner.from_cfg(cfg)
    assert 'ensemble/mIoU' in runner.val()
    assert not (tmp_path / 'networks.json').exists()
