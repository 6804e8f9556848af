import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdistill_ext.functional import (
    contrast_mask,
    select_units,
    selective_distillation,
    unit_difference,
    unit_distillation,
)

DISTANCES = ('kl', 'reverse_kl', 'mse', 'bce')


def plain_difference(x, y, kind):
    """One unit at a time, in probabilities: ``x`` (C,), ``y`` a class."""
    if kind == 'ce':
        return -(x.exp() / x.exp().sum())[y].log()
    p = 1 / (1 + (-x).exp())
    label = torch.tensor([y]) if len(x) == 1 else torch.eye(len(x))[y]
    return -(label * p.log() + (1 - label) * (1 - p).log()).sum()


def plain_distance(s, t, kind, temperature):
    """The same for a distance."""
    if kind == 'mse':
        return ((s - t) ** 2).mean()
    s, t = s / temperature, t / temperature
    if kind == 'bce':
        p, q = 1 / (1 + (-t).exp()), 1 / (1 + (-s).exp())
        each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    else:
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        if kind == 'reverse_kl':
            p, q = q, p
        each = p * (p / q).log()
    return each.sum() * temperature**2


def make(shape=(2, 5, 7), dtype=torch.float64, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=dtype)
    teacher = torch.randn(shape, generator=generator, dtype=dtype)
    size = (shape[0], *shape[2:])
    target = torch.randint(0, max(shape[1], 2), size, generator=generator)
    target[torch.rand(size, generator=generator) < ignored] = 255
    return student, teacher, target


@pytest.mark.parametrize(('kind', 'channels'), [('ce', 5), ('bce', 5), ('bce', 1)])
def test_difference_equals_the_formula_unit_by_unit(kind, channels):
    logits, _, target = make((2, channels, 6))
    found = unit_difference(logits, target, kind)
    for b in range(2):
        for i in range(6):
            y = int(target[b, i])
            expected = 0 if y == 255 else plain_difference(logits[b, :, i], y, kind)
            assert found[b, i].item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize('temperature', [0.5, 1, 3.0])
@pytest.mark.parametrize('kind', DISTANCES)
def test_distance_equals_the_formula_unit_by_unit(kind, temperature):
    student, teacher, _ = make((2, 4, 3))
    found = unit_distillation(student, teacher, kind, temperature)
    for b in range(2):
        for i in range(3):
            expected = plain_distance(student[b, :, i], teacher[b, :, i], kind, temperature)
            assert found[b, i].item() == pytest.approx(float(expected), abs=1e-12)


def test_known_values():
    even = torch.zeros(1, 2, 1)
    assert unit_difference(even, torch.tensor([[1]])).item() == pytest.approx(math.log(2))
    assert unit_difference(even, torch.tensor([[1]]), 'bce').item() == pytest.approx(
        2 * math.log(2)
    )
    # KL(softmax(ln 3, 0) || (1/2, 1/2)) = ln 2 - H(3/4)
    teacher = torch.tensor([math.log(3), 0.0]).view(1, 2, 1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = unit_distillation(even, teacher).item()
    assert found == pytest.approx(math.log(2) - entropy, rel=1e-5)


@pytest.mark.parametrize('kind', DISTANCES)
def test_equal_predictions_have_distance_and_gradient_zero(kind):
    logits = make((2, 5, 7), torch.float32)[0].mul_(30).requires_grad_()
    distance = unit_distillation(logits, logits.detach().clone(), kind, 2.0)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(2, 7))
    assert logits.grad.abs().max() < 1e-5


@pytest.mark.parametrize('average', ['selected', 'valid'])
@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('difference', ['ce', 'bce'])
def test_composition_equals_a_loop_over_units(difference, distance, average):
    student, teacher, target = make((2, 4, 9))
    class_weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    total, weight = 0.0, 0.0
    for b in range(2):
        for i in range(9):
            s, t, y = student[b, :, i], teacher[b, :, i], int(target[b, i])
            if y == 255:
                continue
            wins = plain_difference(t, y, difference) < plain_difference(s, y, difference)
            w = float(class_weight[y])
            total += float(wins) * w * plain_distance(s, t, distance, 2.0).item()
            weight += w if wins or average == 'valid' else 0.0
    found = selective_distillation(
        student,
        teacher,
        target,
        difference=difference,
        distance=distance,
        temperature=2.0,
        class_weight=class_weight,
        average=average,
    )
    assert found.item() == pytest.approx(total / weight, rel=1e-10)


@pytest.mark.parametrize('difference', ['ce', 'bce'])
@pytest.mark.parametrize('distance', DISTANCES)
def test_gradient_is_that_of_the_value(difference, distance):
    student, teacher, target = make((2, 3, 4))
    assert torch.autograd.gradcheck(
        lambda s: selective_distillation(
            s, teacher, target, difference=difference, distance=distance, temperature=1.5
        ),
        student.requires_grad_(),
    )


def test_difference_is_differentiable():
    logits, _, target = make((2, 3, 4))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit_difference(x, target, 'ce'), logits)
    assert torch.autograd.gradcheck(lambda x: unit_difference(x, target, 'bce'), logits)


def test_the_smaller_difference_wins_and_a_tie_goes_to_the_student():
    teacher = torch.tensor([[1.0, 2.0, 2.0, 1.0]])
    student = torch.tensor([[2.0, 1.0, 2.0, 2.0]])
    valid = torch.tensor([[True, True, True, False]])
    assert select_units(teacher, student, valid).tolist() == [[True, False, False, False]]


def test_a_student_equal_to_the_teacher_loses_nowhere():
    student, _, target = make((2, 5, 8, 9), torch.float32)
    student.requires_grad_()
    loss = selective_distillation(student, student.detach().clone(), target)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_a_perfect_teacher_wins_everywhere():
    student, _, target = make((2, 5, 8, 9))
    one_hot = torch.nn.functional.one_hot(target.where(target != 255, 0), 5).movedim(-1, 1)
    teacher = 50.0 * one_hot.double()
    found = selective_distillation(student, teacher, target, temperature=2.0)
    expected = unit_distillation(student, teacher, 'kl', 2.0)[target != 255].mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize('shape', [(2, 5, 7), (6, 5), (1, 5, 1, 1), (0, 5, 4), (2, 5, 2, 3, 4)])
def test_any_shape(shape):
    student, teacher, target = make(shape)
    found = selective_distillation(student, teacher, target)
    flat = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    assert found.item() == pytest.approx(
        selective_distillation(*flat, target.reshape(-1)).item(), rel=1e-10
    )


@pytest.mark.parametrize('difference', ['ce', 'bce'])
@pytest.mark.parametrize('distance', DISTANCES)
def test_nothing_spreads_from_ignored_units(difference, distance):
    student, teacher, target = make((2, 5, 50), torch.float32)
    kinds = dict(difference=difference, distance=distance)
    expected = selective_distillation(student, teacher, target, **kinds)
    void = (target == 255).unsqueeze(1)
    student = student.masked_fill(void, math.nan).requires_grad_()
    teacher = teacher.masked_fill(void, math.inf)
    loss = selective_distillation(student, teacher, target, **kinds)
    loss.backward()
    assert loss.item() == expected.item() > 0
    assert student.grad.isfinite().all()
    assert student.grad.masked_select(void).eq(0).all()

    logits = student.detach().requires_grad_()
    unit_difference(logits, target, difference).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize('distance', DISTANCES)
def test_all_ignored_is_exactly_zero(distance):
    student, teacher, target = make((2, 5, 7), torch.float32)
    student.requires_grad_()
    for average in ('selected', 'valid'):
        loss = selective_distillation(
            student, teacher, torch.full_like(target, 255), distance=distance, average=average
        )
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, target = make((2, 5, 40), torch.float32)
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    loss = selective_distillation(student, teacher, target, temperature=2.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == dtype
    expected = selective_distillation(student.float(), teacher.float(), target, temperature=2.0)
    assert loss.item() == expected.item()


@settings(max_examples=30, deadline=None)
@given(
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e2, 1e4]),
    temperature=st.floats(0.1, 10),
    distance=st.sampled_from(DISTANCES),
    difference=st.sampled_from(['ce', 'bce']),
    seed=st.integers(0, 10**6),
)
def test_finite_and_not_negative(scale, temperature, distance, difference, seed):
    student, teacher, target = make((2, 4, 11), torch.float32, seed)
    student = (student * scale).requires_grad_()
    units = unit_distillation(student, teacher * scale, distance, temperature)
    assert (units > -1e-4 * max(1, scale) * temperature).all()
    assert (unit_difference(student, target, difference) >= 0).all()
    loss = selective_distillation(
        student,
        teacher * scale,
        target,
        difference=difference,
        distance=distance,
        temperature=temperature,
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_contrast_mask_has_three_values():
    wins = torch.tensor([[[True, False], [False, True]]])
    valid = torch.tensor([[[True, True], [False, False]]])
    mask = contrast_mask(wins, valid)
    assert mask.dtype == torch.uint8
    assert mask.tolist() == [[[255, 0], [128, 128]]]
    assert contrast_mask(wins, valid, teacher=1, student=2, void=3).tolist() == [[[1, 2], [3, 3]]]
    with pytest.raises(ValueError, match='void=256'):
        contrast_mask(wins, valid, void=256)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(temperature=0), 'temperature=0'),
        (dict(temperature=-1.0), 'temperature=-1.0'),
        (dict(temperature=math.nan), 'temperature=nan'),
        (dict(distance='l1'), "distance='l1'"),
        (dict(difference='focal'), "difference='focal'"),
        (dict(average='all'), "average='all'"),
        (dict(class_weight=torch.ones(4)), r'\(4,\)'),
        (dict(teacher=torch.zeros(2, 4, 7)), r'\(2, 4, 7\)'),
        (dict(teacher=torch.zeros(2, 5, 6)), r'\(2, 5, 6\)'),
        (dict(target=torch.zeros(2, 6, dtype=torch.long)), r'\(2, 6\)'),
        (dict(target=torch.zeros(2, 7)), 'float32'),
        (dict(target=torch.zeros(2, 7, dtype=torch.bool)), 'bool'),
        (dict(student=torch.zeros(2, 5, 7, dtype=torch.long)), 'int64'),
    ],
)
def test_bad_input_is_named(change, message):
    student, teacher, target = make((2, 5, 7), torch.float32)
    arguments = dict(student=student, teacher=teacher, target=target) | change
    with pytest.raises(ValueError, match=message):
        selective_distillation(**arguments)


def test_softmax_of_one_channel_is_refused():
    student, teacher, target = make((2, 1, 7), torch.float32)
    with pytest.raises(ValueError, match='difference'):
        selective_distillation(student, teacher, target)
    with pytest.raises(ValueError, match='distance'):
        selective_distillation(student, teacher, target, difference='bce')
    kinds = dict(difference='bce', distance='bce')
    assert selective_distillation(student, teacher, target, **kinds) > 0
