import gc
import weakref

import pytest
import torch
from torch import nn

from mmdistill_ext.taps import Taps, resolve, wrapped


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.conv(x)

    def loss(self, x, scale):
        return (self.forward(x) * scale).sum()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head(), Head()])
        self.number = 3

    def forward(self, x):
        return self.heads[0].loss(x, scale=2) + self.heads[1](x).sum()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def instance_attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


def test_modules_and_methods_are_recorded_at_once(model):
    x = torch.randn(1, 2, 4, 4)
    paths = dict(loss='heads.0.loss', direct='heads.0', called='heads.1', inner='heads.1.conv')
    with Taps(model, paths) as taps:
        total = model(x)
    torch.testing.assert_close(taps['loss'].output + taps['called'].output.sum(), total)
    assert taps['loss'].args[0] is x
    assert taps['loss'].kwargs == dict(scale=2)
    torch.testing.assert_close(taps['direct'].output, model.heads[0](x))
    assert taps['inner'].output is taps['called'].output


def test_nothing_is_left_on_the_model(model):
    before = instance_attributes(model)
    with Taps(model, dict(a='heads.0', b='heads.1.conv'), {'heads.0.loss': lambda x, scale: 0}):
        model(torch.randn(1, 2, 4, 4))
    assert instance_attributes(model) == before


def test_a_call_is_recorded_when_it_begins(model):
    """So that what it calls can look at its arguments."""
    x, seen = torch.randn(1, 2, 4, 4), []
    with Taps(model, dict(a='heads.0.loss')) as taps:
        model.heads[0].conv.register_forward_hook(
            lambda *_: seen.append((taps['a'].args, taps['a'].kwargs, taps['a'].output))
        )
        model(x)
    ((args, kwargs, output),) = seen
    assert args[0] is x
    assert kwargs == dict(scale=2)
    assert output is None
    assert taps['a'].output is not None


def test_a_method_is_wrapped_for_a_while(model):
    before, x = instance_attributes(model), torch.ones(1, 2, 4, 4)
    plain = model.heads[0].loss(x, 2)
    with wrapped(model.heads[0], 'loss', lambda loss: lambda *args, **kw: 3 * loss(*args, **kw)):
        torch.testing.assert_close(model.heads[0].loss(x, scale=2), 3 * plain)
        assert model.heads[1].loss.__self__ is model.heads[1]
    assert torch.equal(model.heads[0].loss(x, 2), plain)
    with wrapped(model.heads[0], 'forward', lambda forward: lambda x: 0 * forward(x)):
        assert not model.heads[0](x).any()
    with pytest.raises(ZeroDivisionError), wrapped(model, 'forward', lambda _: 1 / 0):
        pass
    assert instance_attributes(model) == before


def test_wrappers_nest_and_go_also_when_the_call_fails(model):
    own = model.heads[0].__dict__['loss'] = lambda x, scale: x * scale
    one_more = wrapped(model.heads[0], 'loss', lambda loss: lambda *a: loss(*a) + 1)
    with pytest.raises(ZeroDivisionError), one_more:
        with wrapped(model.heads[0], 'loss', lambda loss: lambda *a: loss(*a) * 2):
            assert model.heads[0].loss(3, 5) == 32
        assert model.heads[0].loss(3, 5) == 16
        raise ZeroDivisionError
    assert model.heads[0].__dict__['loss'] is own


def test_wrappers_go_and_records_are_dropped_when_the_forward_fails(model):
    before = instance_attributes(model)
    taps = Taps(model, dict(a='heads.1'))
    with pytest.raises(ZeroDivisionError), taps:
        model(torch.randn(1, 2, 4, 4))
        raise ZeroDivisionError
    assert instance_attributes(model) == before
    assert taps.all('a') == []


def test_no_activation_outlives_clear(model):
    with Taps(model, dict(a='heads.1')) as taps:
        model(torch.randn(1, 2, 4, 4))
    record = weakref.ref(taps['a'].output)
    taps.clear()
    gc.collect()
    assert record() is None


def test_taps_nest_and_earlier_instance_attributes_come_back(model):
    own = model.heads[1].__dict__['forward'] = lambda x: x * 0
    with Taps(model, dict(a='heads.1')) as outer:
        with Taps(model, dict(a='heads.1')) as inner:
            model(torch.ones(1, 2, 4, 4))
        model(torch.ones(1, 2, 4, 4))
    assert len(inner.all('a')) == 1
    assert len(outer.all('a')) == 2
    assert model.heads[1].__dict__['forward'] is own


def test_replaced_method_is_called_instead_and_can_be_tapped(model):
    with Taps(model, dict(a='heads.0.loss'), {'heads.0.loss': lambda x, scale: scale}) as taps:
        model(torch.ones(1, 2, 4, 4))
    assert taps['a'].output == 2


@pytest.mark.parametrize('calls', [0, 2])
def test_one_call_per_step_is_required(model, calls):
    with Taps(model, dict(a='heads.0')) as taps:
        for _ in range(calls):
            model(torch.ones(1, 2, 4, 4))
    with pytest.raises(
        RuntimeError, match=f"'heads.0' should see one call per step. Found {calls}"
    ):
        taps['a']


@pytest.mark.parametrize('path', ['heads.2', 'head.0', 'heads.0.conf', ''])
def test_unknown_path_names_key_value_and_what_exists(model, path):
    with pytest.raises(ValueError, match=f"`losses.a.head`.*Found '{path}'.*has no") as caught:
        resolve(model, path, 'losses.a.head')
    assert 'only: ' in str(caught.value)


def test_path_to_something_not_callable_is_refused(model):
    with pytest.raises(ValueError, match="`tap` should lead to a module or method. Found 'number'"):
        resolve(model, 'number', 'tap')


class Counting(nn.Module):
    """Three steps in a row; the second is taken twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Identity(), nn.Identity(), nn.Identity()
        self.inner = nn.Sequential(nn.Identity())
        self.done = []

    def forward(self, x):
        for name in ('first', 'second', 'second', 'inner', 'third'):
            x = getattr(self, name)(x)
            self.done.append(name)
        return x


@pytest.mark.parametrize(
    ('stop_after', 'done'),
    [
        (dict(first=1), []),
        (dict(second=1), ['first']),
        (dict(second=2), ['first', 'second']),
        (dict(first=1, second=2), ['first', 'second']),
        ({'inner': 1, 'inner.0': 1}, ['first', 'second', 'second']),  # one inside of the other
        (dict(second=3), ['first', 'second', 'second', 'inner', 'third']),  # more than there are
    ],
)
def test_forward_stops_once_all_wanted_calls_are_over(stop_after, done):
    model, x = Counting(), torch.ones(2)
    before = instance_attributes(model)
    with Taps(model, {name: name for name in stop_after}, stop_after=stop_after) as taps:
        model(x)
    assert model.done == done
    for name, count in stop_after.items():
        assert len(taps.all(name)) == min(count, 2)
        assert all(call.output is not None for call in taps.all(name))
    assert instance_attributes(model) == before


def test_stop_of_inner_taps_does_not_end_outer_ones():
    model = Counting()
    with Taps(model, dict(third='third')) as outer:
        with Taps(model, dict(first='first'), stop_after=dict(first=1)):
            model(torch.ones(2))
        model(torch.ones(2))
    assert len(outer.all('third')) == 1


def test_compiled_module_is_recorded_from_outside():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    calls = []
    model[0]._compiled_call_impl = lambda x: calls.append('compiled') or model[0].forward(x)
    with Taps(model, dict(a='0')) as taps:
        expected = model(torch.ones(1, 2))
    assert calls == ['compiled']
    assert torch.equal(taps['a'].output.relu(), expected)
    assert '_compiled_call_impl' in vars(model[0])
