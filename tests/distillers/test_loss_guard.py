"""A loss that is not finite ends the run before the weights take it in, or its step is left out."""

import copy
import re
from functools import partial

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmdistill_ext.distillers.loss_guard import LossGuard
from mmdistill_ext.hooks import SkipNonFiniteHook
from tests import tiny_seg
from tests.runs import assert_identical, plain_config
from tests.tiny_collaboration import PER_NETWORK, collaborate
from tests.two_ranks import in_two_ranks

BAD = 2  # iteration, counted from 1


@HOOKS.register_module(force=True)
class SpoilHook(Hook):
    """Spoils a loss, or an image, of chosen iterations; keeps weights and optimizer before each."""

    priority = 'VERY_LOW'

    def __init__(self, head='decode_head', what='loss', value=float('nan'), at=(BAD,), rank=0):
        self.head, self.what, self.value, self.at, self.rank = head, what, value, at, rank
        self.states = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = getattr(runner.model, 'module', runner.model)
        self.states.append(copy.deepcopy(state_of(runner)))
        bad = runner.iter + 1 in self.at and runner.rank == self.rank
        if self.what == 'image' and bad:
            data_batch['inputs'][1] = data_batch['inputs'][1] * self.value
        if self.what == 'loss':
            loss = model.get_submodule(self.head).loss_decode
            loss.loss_weight = self.value if bad else 1.0


@pytest.fixture(scope='module')
def data(root):
    tiny_seg.save_weights(root / 't.pth', tiny_seg.model(16), seed=1)
    return root


def config(data, tmp_path, spoil, iterations=4, **wrapper):
    """Return a distilled run whose images come in order."""
    plain = plain_config(data, tmp_path / 'work', iterations)
    plain.optim_wrapper.update(wrapper)
    plain.param_scheduler = []
    plain.val_dataloader = plain.val_cfg = plain.val_evaluator = None
    plain.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    return tiny_seg.distil(plain, str(data / 't.pth'), spoil=dict(type='SpoilHook', **spoil))


def start(cfg):
    tiny_seg.forget_runs()
    return Runner.from_cfg(cfg)


def hook_of(runner, cls):
    return next(hook for hook in runner.hooks if isinstance(hook, cls))


def state_of(runner):
    """Weights, buffers, and what optimizers and scalers remember; not the rates."""
    model = getattr(runner.model, 'module', runner.model)
    states = runner.optim_wrapper.state_dict()
    optimizers = (
        states.values()
        if PER_NETWORK['constructor'] == runner.cfg.optim_wrapper.get('constructor')
        else [states]
    )
    memory = [{key: value for key, value in x.items() if key != 'param_groups'} for x in optimizers]
    return {**model.state_dict(), 'memory': memory}


def ends(cfg, *found):
    """Run; it ends in the bad iteration, names what was found, and no weight has changed."""
    runner = start(cfg)
    with pytest.raises(FloatingPointError, match='Losses should be finite. Found') as error:
        runner.train()
    for text in found:
        assert text in str(error.value)
    assert runner.iter + 1 == BAD
    before, after = hook_of(runner, SpoilHook).states[-1], state_of(runner)
    for name in ['memory', *dict(runner.model.named_parameters())]:
        assert_identical(after[name], before[name])
    return str(error.value)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_the_run_ends_with_term_iteration_and_images(data, tmp_path, value):
    cfg = config(data, tmp_path, dict(value=value))
    text = ends(cfg, f"{value} in 'decode.loss_ce' at iteration 2", 'SkipNonFiniteHook')
    assert re.search(r"images '[^']*/img/train/2.png', '[^']*/img/train/3.png'", text)
    assert "'loss'" not in text


def test_a_broken_image_is_named(data, tmp_path):
    text = ends(config(data, tmp_path, dict(what='image')), "nan in 'decode.loss_ce'")
    assert re.search(r"of which '[^']*/train/3.png' have pixels that are not finite", text)


def test_a_sum_that_overflows_is_named():
    guard, part = LossGuard(), torch.tensor(3e38, requires_grad=True)
    guard.watch(part + part, dict(loss=part + part, loss_a=part, loss_b=part, accuracy=part / 0))
    loss = part + part
    guard.watch(loss, dict(loss=loss, loss_a=part, loss_b=part, accuracy=part / 0))
    with pytest.raises(FloatingPointError, match=r"Found inf in 'loss' at iter\w+ \d+, batch unkn"):
        loss.backward()


def test_without_an_active_term(data, tmp_path):
    cfg = config(data, tmp_path, {})
    cfg.model.losses.sel.begin = 3  # after the bad iteration
    ends(cfg, "nan in 'decode.loss_ce'")


def test_gradients_that_are_accumulated(data, tmp_path):
    ends(config(data, tmp_path, {}, accumulative_counts=2), "nan in 'decode.loss_ce'")


def networks(data, tmp_path, wrapper, **hook):
    """Return a run of two networks, the second of which is spoilt."""
    cfg = collaborate(plain_config(data, tmp_path / 'work'), dict(type='MinLoss'))
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    spoil = dict(type='SpoilHook', head='students.b.decode_head')
    cfg.custom_hooks = [spoil, *([hook] if hook else [])]
    cfg.optim_wrapper = wrapper
    return cfg


@pytest.mark.parametrize('per_network', [False, True])
def test_networks_that_teach_each_other(data, tmp_path, per_network):
    one = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
    cfg = networks(data, tmp_path, PER_NETWORK if per_network else one)
    ends(cfg, "nan in 'b/loss_ce' at iteration 2, images '", '/train/2.png')


@pytest.fixture
def amp(monkeypatch):
    """Allow AMP without a GPU."""
    scaler = partial(torch.amp.GradScaler, device='cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)
    return dict(type='AmpOptimWrapper', dtype='bfloat16')


def test_the_search_for_a_loss_scale_ends_no_run(data, tmp_path, amp):
    amp.update(loss_scale=dict(init_scale=2.0**127))
    cfg = config(data, tmp_path, dict(what='nothing'), iterations=8, **amp)
    cfg.model.student.decode_head.loss_decode.loss_weight = 10.0  # the scaled loss overflows
    runner = start(cfg)
    runner.train()
    states = hook_of(runner, SpoilHook).states
    name = 'decode_head.conv_seg.weight'
    assert torch.equal(states[1][name], states[0][name])  # the scale is too large
    assert runner.optim_wrapper.loss_scaler.get_scale() < 2.0**127
    assert not torch.equal(state_of(runner)[name], states[0][name])


def test_amp_with_a_bad_loss(data, tmp_path, amp):
    ends(config(data, tmp_path, {}, **amp), "nan in 'decode.loss_ce'")


@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_a_step_is_left_out(data, tmp_path, accumulative_counts):
    cfg = config(data, tmp_path, {}, accumulative_counts=accumulative_counts)
    cfg.custom_hooks.append(dict(type='mmdistill_ext.SkipNonFiniteHook'))
    runner = start(cfg)
    runner.train()
    states = hook_of(runner, SpoilHook).states
    assert_identical(states[BAD], states[BAD - accumulative_counts])  # before this update
    after, name = state_of(runner), 'decode_head.conv_seg.weight'
    assert not torch.equal(after[name], states[BAD][name])
    assert all(after[key].isfinite().all() for key in runner.model.state_dict())
    text = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert "A step is left out, its loss is not finite: nan in 'decode.loss_ce' at iter" in text
    assert not runner.model.loss_guard.defers


def test_a_step_of_amp_is_left_out(data, tmp_path, amp):
    cfg = config(data, tmp_path, dict(value=float('inf')), **amp)
    cfg.custom_hooks.append(dict(type='mmdistill_ext.SkipNonFiniteHook'))
    runner = start(cfg)
    runner.train()
    states = hook_of(runner, SpoilHook).states
    assert_identical(states[BAD], states[BAD - 1])  # the scale too


def test_steps_of_several_optimizers_are_left_out(data, tmp_path):
    cfg = networks(data, tmp_path, PER_NETWORK, type='mmdistill_ext.SkipNonFiniteHook')
    runner = start(cfg)
    runner.train()
    states = hook_of(runner, SpoilHook).states
    assert_identical(states[BAD], states[BAD - 1])


def test_too_many_in_a_row_end_the_run(data, tmp_path):
    cfg = config(data, tmp_path, dict(at=(2, 3)))
    cfg.custom_hooks.append(dict(type='mmdistill_ext.SkipNonFiniteHook', limit=2))
    with pytest.raises(FloatingPointError, match=r'2 steps in a row \(`SkipNonFiniteHook.limit`\)'):
        start(cfg).train()


def test_a_step_that_is_left_out_does_not_count_for_the_fitting_error(data, tmp_path):
    cfg = config(data, tmp_path, {})
    val = tiny_seg.config(data, tmp_path)
    cfg.model.fit = dict(function=dict(type='ExponentialFit', b=10.0))
    cfg.custom_hooks += [
        dict(type='mmdistill_ext.SkipNonFiniteHook'),
        dict(type='mmdistill_ext.FitHook', interval=4, dataloader=val.val_dataloader, batches=2),
    ]
    cfg.model.student.decode_head.loss_decode = dict(type='CrossEntropyLoss')
    cfg.custom_hooks[0].update(what='image')
    runner = start(cfg)
    runner.train()
    assert runner.message_hub.get_scalar('train/fit/error').current() is not None


@pytest.mark.parametrize('limit', [0, 1.5, True, None])
def test_an_impossible_limit(limit):
    with pytest.raises(ValueError, match=f'limit` should be an integer.* Found {limit}'):
        SkipNonFiniteHook(limit)


def test_a_plain_model_has_no_guard(data, tmp_path):
    cfg = plain_config(data, tmp_path / 'work', 1)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.custom_hooks = [dict(type='mmdistill_ext.SkipNonFiniteHook')]
    with pytest.raises(ValueError, match='`SkipNonFiniteHook` needs a distiller as model'):
        start(cfg).train()


def train_in_rank(rank, stops, skips):
    """Return the error, and whether in the second run the bad and the last step changed weights."""
    runner = start(stops)
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    assert runner.iter + 1 == BAD
    runner = start(skips)
    runner.train()
    states, name = hook_of(runner, SpoilHook).states, 'decode_head.conv_seg.weight'
    pairs = ((states[BAD - 1], states[BAD]), (states[BAD], state_of(runner)))
    return str(error.value), [not torch.equal(a[name], b[name]) for a, b in pairs]


def test_all_ranks_stop_together_and_leave_out_the_same_steps(data, tmp_path):
    stops, skips = (config(data, tmp_path, dict(rank=1)) for _ in range(2))
    for cfg in (stops, skips):
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    skips.custom_hooks.append(dict(type='mmdistill_ext.SkipNonFiniteHook'))
    first, second = in_two_ranks(train_in_rank, stops, skips)
    assert first == second
    assert "Found rank 1: nan in 'decode.loss_ce' at iteration 2" in first[0]
    assert first[1] == [False, True]
