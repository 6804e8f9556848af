"""One loss, an optimizer for each network."""

from functools import partial

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from torch import nn

from tests import tiny_seg
from tests.runs import assert_identical, state_of, train
from tests.tiny_collaboration import config

CONSTRUCTOR = 'mmdistill_ext.PerNetworkOptimWrapperConstructor'
KINDS = [
    dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-3),
    dict(type='AdamW', lr=0.01),
]


class Networks(nn.Module):
    """Two small networks with one loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.students = nn.ModuleDict(dict(a=nn.Linear(3, 2), b=nn.Linear(3, 2)))

    def forward(self, images):
        a, b = (network(images) for network in self.students.values())
        return (a - 1).square().mean() + (b + 1).square().mean() + (a - b).square().mean()


def one_optimizer(optimizer, **wrapper):
    model = Networks()
    return model, build_optim_wrapper(model, dict(optimizer=optimizer, **wrapper))


def per_network(a, b=None, **wrapper):
    model = Networks()
    optimizers = dict(a=a, b=b or a)
    cfg = {name: dict(optimizer=x, **wrapper) for name, x in optimizers.items()}
    return model, build_optim_wrapper(model, Config(dict(constructor=CONSTRUCTOR, **cfg))._cfg_dict)


def steps(model, wrapper, count=5, max_count=5):
    """Train; return the weights after every step."""
    generator = torch.Generator().manual_seed(1)
    wrapper.initialize_count_status(model, 0, max_count)
    found = []
    for _ in range(count):
        images = torch.randn(4, 3, generator=generator)
        with wrapper.optim_context(model):
            loss = model(images)
        wrapper.update_params(loss)
        found.append({key: value.clone() for key, value in model.state_dict().items()})
    return found


def gradients(weights, name):
    """Parameters of a network with their gradients in the first of :func:`steps`."""
    model = Networks()
    model.load_state_dict(weights)
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(1))).backward()
    return list(model.students[name].parameters())


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize('optimizer', KINDS, ids=lambda x: x['type'])
@pytest.mark.parametrize('counts', [1, 2, 3])
def test_equal_settings_train_as_one_optimizer_bit_for_bit(optimizer, counts):
    """Also the last steps, which are fewer than ``accumulative_counts``."""
    clip = dict(type='value', clip_value=0.3)
    settings = dict(accumulative_counts=counts)
    one = steps(*one_optimizer(optimizer, **settings, clip_grad=dict(clip)))
    joint = steps(*per_network(optimizer, **settings, clip_grad=dict(clip)))
    assert all(map(same, one, joint))
    assert not same(one[0], one[-1])


def test_parameters_change_at_the_right_steps():
    model, wrapper = per_network(*KINDS, accumulative_counts=2)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    states = [start, *steps(model, wrapper)]
    for network in ('a', 'b'):
        key = f'students.{network}.weight'
        changed = [not torch.equal(states[i][key], states[i + 1][key]) for i in range(5)]
        assert changed == [False, True, False, True, True]


def test_every_network_has_its_own_settings():
    """Network a stands still; b trains as if a did so with one optimizer."""
    model, wrapper = per_network(dict(type='SGD', lr=0.0), dict(type='SGD', lr=0.1))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    end = steps(model, wrapper)[-1]
    paramwise = dict(custom_keys={'students.a': dict(lr_mult=0.0)})
    alone, other = one_optimizer(dict(type='SGD', lr=0.1), paramwise_cfg=paramwise)
    assert same(end, steps(alone, other)[-1])
    assert torch.equal(start['students.a.weight'], end['students.a.weight'])
    assert not torch.equal(start['students.b.weight'], end['students.b.weight'])
    assert wrapper.get_lr() == {'a.lr': [0.0], 'b.lr': [0.1]}


def test_gradients_are_clipped_for_each_network_by_its_own_norm():
    model, wrapper = per_network(dict(type='SGD', lr=1.0), clip_grad=dict(max_norm=0.01))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    (end,) = steps(model, wrapper, count=1)
    logged = MessageHub.get_current_instance().log_scalars
    for name in ('a', 'b'):
        norm = torch.stack([x.grad.norm() for x in gradients(start, name)]).norm().item()
        assert logged[f'train/{name}/grad_norm'].current() == pytest.approx(norm, rel=1e-4)
        moved = [end[k] - start[k] for k in start if k.startswith(f'students.{name}.')]
        length = torch.cat([x.flatten() for x in moved]).norm().item()
        assert length == pytest.approx(0.01, rel=1e-3)


def test_state_goes_on_from_a_checkpoint():
    whole = steps(*per_network(*KINDS), count=4)
    model, wrapper = per_network(*KINDS)
    steps(model, wrapper, count=2)
    again, other = per_network(*KINDS)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(wrapper.state_dict())
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 3, generator=generator) for _ in range(4)]
    for batch in images[2:]:
        other.update_params(again(batch))
    assert same(again.state_dict(), whole[-1])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(b=None), r"for each of the networks \['a', 'b'\]\. Found \['a'\]"),
        (dict(c=dict(optimizer=KINDS[0])), r"Found \['a', 'b', 'c'\]"),
        (dict(optimizer=KINDS[0]), r"Found \['a', 'b', 'optimizer'\]"),
        (dict(paramwise_cfg=dict(norm_decay_mult=0)), r"inside of each network's own config"),
        (
            dict(b=dict(optimizer=KINDS[0], accumulative_counts=2)),
            r"<network>\.accumulative_counts` should be the same.*'a': 1, 'b': 2",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    cfg = dict(a=dict(optimizer=KINDS[0]), b=dict(optimizer=KINDS[0]))
    cfg = {key: value for key, value in {**cfg, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(Networks(), Config(dict(constructor=CONSTRUCTOR, **cfg))._cfg_dict)


def test_a_model_without_networks_is_refused():
    cfg = Config(dict(constructor=CONSTRUCTOR, a=dict(optimizer=KINDS[0])))._cfg_dict
    with pytest.raises(ValueError, match=r"networks \[\]\. Found \['a'\]"):
        build_optim_wrapper(nn.Linear(2, 2), cfg)


@pytest.fixture
def amp(monkeypatch):
    """Let mmengine's wrapper scale losses on the CPU as it does on a GPU."""
    scaler = partial(torch.amp.GradScaler, device='cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)
    return dict(type='AmpOptimWrapper', dtype='bfloat16')


@pytest.mark.parametrize('clip', [None, dict(type='value', clip_value=0.3)])
def test_a_fixed_loss_scale_is_taken_out_of_every_network(amp, clip):
    """A power of two changes no digit: the weights are those without it."""
    plain = per_network(*KINDS, clip_grad=clip and dict(clip), accumulative_counts=2)
    scaled = per_network(*KINDS, clip_grad=clip, accumulative_counts=2, **amp, loss_scale=1024.0)
    expected = steps(*plain)
    model, wrapper = scaled
    generator = torch.Generator().manual_seed(1)
    wrapper.initialize_count_status(model, 0, 5)
    for state in expected:  # the forward in full precision, to compare the steps alone
        wrapper.update_params(model(torch.randn(4, 3, generator=generator)))
        assert same(model.state_dict(), state)


@pytest.mark.parametrize(
    ('a', 'b', 'message'),
    [
        (dict(), dict(), 'loss_scale` should be one fixed number'),
        (dict(loss_scale=2.0), dict(loss_scale=4.0), 'loss_scale` should be one fixed number'),
        (dict(loss_scale=2.0), dict(type='OptimWrapper'), r"type` should be the same.*'b': 'Optim"),
        (
            dict(loss_scale=2.0),
            dict(loss_scale=2.0, dtype='float16'),
            r'dtype` should be the same.*bfloat16.*float16',
        ),
    ],
)
def test_mixed_precision_that_cannot_be_shared_is_refused(amp, a, b, message):
    b = {**amp, **b} if 'type' not in b else b
    cfg = dict(
        a=dict(optimizer=KINDS[0], **{**amp, **a}),
        b=dict(optimizer=KINDS[0], **b),
    )
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(Networks(), Config(dict(constructor=CONSTRUCTOR, **cfg))._cfg_dict)


def run_config(root, work_dir, per_network):
    cfg = config(root, work_dir, dict(type='MinLoss'), iterations=3)
    wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=0.01),
        accumulative_counts=2,
        clip_grad=dict(type='value', clip_value=0.1),
    )
    cfg.optim_wrapper = wrapper
    if per_network:
        cfg.optim_wrapper = dict(constructor=CONSTRUCTOR, a=wrapper, b=wrapper)
    return cfg


def test_whole_runs_with_equal_settings_are_alike(root, tmp_path):
    for name in ('one', 'each'):
        train(run_config(root, tmp_path / name, name == 'each'))
    for iteration in (2, 3):
        states = [state_of(tmp_path / name / f'iter_{iteration}.pth') for name in ('one', 'each')]
        assert_identical(*(state['state_dict'] for state in states))
    assert isinstance(states[0]['param_schedulers'], list)
    assert set(states[1]['param_schedulers']) == set(states[1]['optimizer']) == {'a', 'b'}


def test_the_option_for_mixed_precision_is_refused(root, tmp_path):
    run_config(root, tmp_path / 'work', per_network=True).dump(tmp_path / 'run.py')
    with pytest.raises(ValueError, match=r"`--amp` is for one optimizer.*each network's config"):
        tiny_seg.tool('train')(tmp_path / 'run.py', '--amp')


def test_learning_rates_are_scaled_for_every_network(root, tmp_path):
    cfg = run_config(root, tmp_path, per_network=True)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=4)
    tiny_seg.forget_runs()
    runner = Runner.from_cfg(cfg)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, cfg.auto_scale_lr)
    assert runner.optim_wrapper.get_lr()['b.lr'] == [0.005]
