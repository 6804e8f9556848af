"""What holds of every registered loss."""

import pytest
import torch

from tests.losses.contract import (
    CASES,
    IMAGES,
    UNITS,
    accepted,
    build,
    inputs_of,
    outcome,
    registered,
    total,
)
from tests.two_ranks import in_two_ranks

every_case = pytest.mark.parametrize(('name', 'sort'), CASES)


def make(name, sort, **options):
    inputs = inputs_of(sort)
    return build(name), inputs, inputs.make(**options)


def test_every_registered_loss_has_inputs():
    assert {'KDLoss', 'SelectiveLoss', 'DKDLoss'} <= set(registered())
    for name in registered():
        assert accepted(name), f'{name} refuses every head of tests/losses/contract.py'


def test_losses_of_units_take_what_they_are_for():
    everything = set(UNITS)
    assert set(accepted('KDLoss')) == set(accepted('SelectiveLoss')) == everything
    assert set(accepted('DKDLoss')) == {'softmax map', 'softmax RoIs'}


@every_case
def test_a_random_student_has_something_to_learn(name, sort):
    value, gradients = outcome(*make(name, sort))
    assert value > 0
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert all(g.abs().max() > 0 for g in gradients)


@every_case
def test_a_student_equal_to_the_teacher_loses_nothing(name, sort):
    loss, inputs, data = make(name, sort, dtype=torch.float64)
    value, gradients = outcome(loss, inputs, inputs.equal(data))
    assert value.abs() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients)


@every_case
def test_gradcheck(name, sort):
    loss, inputs, data = make(name, sort, dtype=torch.float64)
    leaves = inputs.tensors(data.student)
    assert torch.autograd.gradcheck(
        lambda *leaves: total(loss(inputs.with_student(data, leaves))), leaves
    )


@every_case
@pytest.mark.parametrize('bad', [1.0, float('nan'), float('inf')])
def test_all_ignored_is_exactly_zero(name, sort, bad):
    loss, inputs, data = make(name, sort)
    data = inputs.change(inputs.ignore(data), lambda x: x.detach() * bad)
    value, gradients = outcome(loss, inputs, data)
    assert value == 0
    assert not any(g.any() for g in gradients)


@every_case
def test_no_image_is_exactly_zero(name, sort):
    loss, inputs, data = make(name, sort)
    value, gradients = outcome(loss, inputs, inputs.part(data, slice(0, 0)))
    assert value == 0
    assert all(g.numel() == 0 for g in gradients)


@pytest.mark.parametrize(('name', 'sort'), [case for case in CASES if case[1] in UNITS])
def test_one_class_alone(name, sort):
    """Also background alone: a detector without positive units."""
    loss, inputs, data = make(name, sort)
    for label in range(inputs.labels):
        value, gradients = outcome(loss, inputs, inputs.relabel(data, label))
        assert value.isfinite()
        assert value > 0
        assert all(g.isfinite().all() for g in gradients)


@every_case
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_loss_in_float32(name, sort, dtype):
    loss, inputs, data = make(name, sort, dtype=dtype)
    single = inputs.change(data, lambda x: x.detach().float())
    (value, gradients), (expected, others) = (outcome(loss, inputs, x) for x in (data, single))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    for own, other in zip(gradients, others, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, other.to(dtype), rtol=1e-2, atol=1e-5)


def strided(x):
    """The same values, every second element of a tensor."""
    room = x.detach().new_full((*x.shape[:-1], 2 * x.shape[-1]), float('nan'))
    room[..., ::2] = x.detach()
    return room[..., ::2]


def channels_last(x):
    x = x.detach()
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT


@every_case
@pytest.mark.parametrize('layout', [strided, channels_last])
def test_memory_layout_does_not_matter(name, sort, layout):
    loss, inputs, data = make(name, sort)
    expected, others = outcome(loss, inputs, data)
    value, gradients = outcome(loss, inputs, inputs.change(data, layout))
    torch.testing.assert_close(value, expected)
    for own, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(own, other)


@every_case
def test_autocast_changes_nothing(name, sort):
    loss, inputs, data = make(name, sort)
    expected, others = outcome(loss, inputs, data)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        value, gradients = outcome(loss, inputs, data)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(map(torch.equal, gradients, others))


@every_case
def test_the_teacher_gets_no_gradient(name, sort):
    loss, inputs, data = make(name, sort)
    teachers = inputs.tensors(data.teacher)
    for x in teachers:
        x.requires_grad_()
    found = torch.autograd.grad(total(loss(data)), teachers, allow_unused=True)
    assert all(g is None or not g.any() for g in found)


@every_case
def test_the_weight_is_a_factor(name, sort):
    loss, _, data = make(name, sort)
    torch.testing.assert_close(total(loss(data, 3.0)), 3 * total(loss(data)))


def worker(rank):
    """One of two ranks: each has half of the batch."""
    half = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    found = {}
    for name, sort in CASES:
        loss, inputs, data = make(name, sort)
        found[name, sort] = outcome(loss, inputs, inputs.part(data, half))
    return found


@pytest.fixture(scope='module')
def two_ranks():
    return in_two_ranks(worker)


@every_case
def test_two_ranks_are_one(two_ranks, name, sort):
    expected, gradients = outcome(*make(name, sort))
    (first, first_gradients), (second, second_gradients) = (x[name, sort] for x in two_ranks)
    torch.testing.assert_close((first + second) / 2, expected)
    parts = zip(first_gradients, second_gradients, gradients, strict=True)
    for a, b, whole in parts:
        torch.testing.assert_close(torch.cat((a, b)) / 2, whole, rtol=1e-4, atol=1e-7)
