import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdistill_ext.functional import (
    unit_difference,
    unit_distillation,
)
from tests.functional.passes import distil

KINDS = list(itertools.product(('ce', 'bce'), ('kl', 'reverse_kl', 'mse', 'bce')))


def plain(student, teacher, target, temperature, align=(False, False)):
    """The five lines that everything is measured against: sum over the units the teacher wins."""
    size = target.shape[1:]
    student, teacher = (
        F.interpolate(x, size, mode='bilinear', align_corners=a)
        for x, a in zip((student, teacher), align, strict=True)
    )
    task = F.cross_entropy(student, target, reduction='none', ignore_index=255)
    other = F.cross_entropy(teacher, target, reduction='none', ignore_index=255)
    wins = (other < task) & (target != 255)
    student, teacher = (
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
    )
    kl = F.kl_div(student, teacher, reduction='none', log_target=True).sum(1) * temperature**2
    return (kl * wins).sum(), wins, task.sum()


def make(student=(2, 5, 9, 13), teacher=None, size=None, seed=0, dtype=torch.float32, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    teacher = teacher or student
    size = (student[0], *(size or student[2:]))
    target = torch.randint(0, max(student[1], 2), size, generator=generator)
    target[torch.rand(size, generator=generator) < ignored] = 255
    student = torch.randn(student, generator=generator, dtype=dtype).requires_grad_()
    return student, torch.randn(teacher, generator=generator, dtype=dtype), target


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


SIZES = [(1, 1), (5, 7), (10, 14), (17, 23), (20, 27), (40, 30)]


@pytest.mark.parametrize('align', [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize('teacher_size', SIZES)
@pytest.mark.parametrize('student_size', SIZES)
def test_equals_the_plain_reference_at_any_stride(student_size, teacher_size, align):
    size = (20, 27)
    student, teacher, target = make((2, 4, *student_size), (2, 4, *teacher_size), size)
    expected, wins, task = plain(student, teacher, target, 2.0, align)
    result = distil(
        student,
        teacher,
        target,
        temperature=2.0,
        student_align_corners=align[0],
        teacher_align_corners=align[1],
        own=True,
        keep_wins=True,
        block_bytes=4 * 27 * 4 * 3,
    )
    torch.testing.assert_close(result.distill_sum, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.own_sum, task, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.wins, wins)
    assert result.distill_weight == wins.sum()
    for own, other in ((result.distill_sum, expected), (result.own_sum, task)):
        torch.testing.assert_close(
            gradient(own, student), gradient(other, student), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize('block_bytes', [1, 4 * 5 * 50, 10**9])
@pytest.mark.parametrize(
    'shape', [(2, 5, 9, 13), (2, 5, 40), (60, 5), (1, 5, 1, 1), (2, 5, 3, 4, 5)]
)
def test_equals_the_plain_reference_for_any_shape_and_block(shape, block_bytes):
    student, teacher, target = make(shape)
    units = unit_distillation(student, teacher, 'kl', 3.0)
    wins = unit_difference(teacher, target) < unit_difference(student, target)
    result = distil(
        student, teacher, target, temperature=3.0, keep_wins=True, block_bytes=block_bytes
    )
    expected = (units * wins).sum()
    torch.testing.assert_close(result.distill_sum, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(result.distill_sum, student), gradient(expected, student))
    assert torch.equal(result.wins, wins)


@pytest.mark.parametrize('sigmoid_channels', [1, 5])
@pytest.mark.parametrize(('difference', 'distance'), KINDS)
def test_every_kind_with_class_weights(difference, distance, sigmoid_channels):
    channels = sigmoid_channels if difference == 'bce' and distance in ('bce', 'mse') else 5
    student, teacher, target = make((2, channels, 6, 7), (2, channels, 5, 4), (11, 12))
    class_weight = torch.tensor([1.0, 0.0, 2.5, 0.5, 1.5])[: max(channels, 2)]
    full = F.interpolate(student, (11, 12), mode='bilinear')
    full_teacher = F.interpolate(teacher, (11, 12), mode='bilinear')
    wins = unit_difference(full_teacher, target, difference) < unit_difference(
        full, target, difference
    )
    for selection, selected in (('teacher_better', wins), ('all', target != 255)):
        weight = class_weight[target.where(selected, 0)] * selected
        units = unit_distillation(full, full_teacher, distance, 2.0)
        result = distil(
            student,
            teacher,
            target,
            selection=selection,
            difference=difference,
            distance=distance,
            temperature=2.0,
            class_weight=class_weight,
            block_bytes=4 * 12 * channels * 2,
        )
        torch.testing.assert_close(result.distill_sum, (units * weight).sum())
        torch.testing.assert_close(result.distill_weight, weight.sum())
        torch.testing.assert_close(
            gradient(result.distill_sum, student),
            gradient((units * weight).sum(), student),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('difference', 'distance'), KINDS)
def test_gradcheck(difference, distance, stride):
    student, teacher, target = make((1, 3, 2, 3), None, (2 * stride, 3 * stride), 1, torch.float64)

    def function(x):
        result = distil(
            x,
            teacher,
            target,
            selection='all',
            difference=difference,
            distance=distance,
            temperature=1.5,
            own=True,
            block_bytes=100,
        )
        return result.distill_sum, result.own_sum

    assert torch.autograd.gradcheck(function, student)


def test_own_entries_with_class_weights_and_counts():
    student, teacher, target = make((2, 4, 5, 6), None, (10, 12))
    class_weight = torch.tensor([1.0, 0.0, 3.0, 0.2])
    result = distil(
        student, teacher, target, own=True, own_class_weight=class_weight, block_bytes=500
    )
    full = F.interpolate(student, (10, 12), mode='bilinear')
    expected = F.cross_entropy(full, target, class_weight, reduction='sum', ignore_index=255)
    torch.testing.assert_close(result.own_sum, expected)
    torch.testing.assert_close(gradient(result.own_sum, student), gradient(expected, student))
    assert result.correct == (full.argmax(1) == target).sum()
    _, wins, _ = plain(student, teacher, target, 1.0)
    for row, units in zip(result.counts, (target != 255, wins), strict=True):
        assert row.tolist() == target[units].bincount(minlength=4).tolist()


def test_a_binary_head_has_two_classes():
    student, teacher, target = make((2, 1, 5, 6))
    kinds = dict(difference='bce', distance='bce', class_weight=torch.tensor([0.0, 2.0]))
    result = distil(student, teacher, target, selection='all', **kinds)
    assert result.counts[0].tolist() == [(target == 0).sum(), (target == 1).sum()]
    assert result.distill_weight == 2 * (target == 1).sum()


def test_both_sums_in_one_backward_pass():
    student, teacher, target = make((2, 4, 5, 6), None, (10, 12))
    expected, _, task = plain(student, teacher, target, 2.0)
    result = distil(student, teacher, target, temperature=2.0, own=True)
    (0.3 * result.distill_sum + 0.7 * result.own_sum).backward()
    torch.testing.assert_close(student.grad, gradient(0.3 * expected + 0.7 * task, student))


@pytest.mark.parametrize('task', [False, True])
def test_the_graph_can_be_kept_and_is_used_up_otherwise(task):
    student, teacher, target = make()
    result = distil(student, teacher, target, own=task)
    loss = result.distill_sum + result.own_sum if task else result.distill_sum
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, 2 * once)
    with pytest.raises(RuntimeError, match='retain_graph'):
        loss.backward()


def test_without_gradient_the_sums_are_the_same():
    student, teacher, target = make((2, 4, 5, 6), None, (10, 12))
    expected = distil(student, teacher, target, own=True)
    with torch.no_grad():
        found = distil(student, teacher, target, own=True)
    assert not found.distill_sum.requires_grad
    assert found.distill_sum == expected.distill_sum
    assert found.own_sum == expected.own_sum


def test_a_selection_of_ones_own():
    """Weights per unit from what the teacher says, as a method that weighs units would give."""
    student, teacher, target = make((2, 4, 30))

    def selection(block):
        assert block.student_difference.shape == block.labels.target.shape == block.wins.shape
        right = block.teacher.argmax(1) == block.labels.target
        return torch.where(right, 1.0, 0.25)

    result = distil(student, teacher, target, selection=selection, block_bytes=200)
    weight = torch.where(teacher.argmax(1) == target, 1.0, 0.25) * (target != 255)
    expected = (unit_distillation(student, teacher) * weight).sum()
    torch.testing.assert_close(result.distill_sum, expected)
    torch.testing.assert_close(result.distill_weight, weight.sum())
    torch.testing.assert_close(gradient(result.distill_sum, student), gradient(expected, student))


def test_a_student_equal_to_the_teacher_loses_nowhere():
    student, _, target = make((2, 5, 6, 7), None, (12, 14))
    result = distil(student, student.detach().clone(), target, keep_wins=True)
    assert result.distill_sum == 0 == result.distill_weight
    assert not result.wins.any()
    assert torch.equal(gradient(result.distill_sum, student), torch.zeros_like(student))


@pytest.mark.parametrize(('difference', 'distance'), KINDS)
@pytest.mark.parametrize('size', [(6, 7), (12, 14)])
def test_all_ignored_is_exactly_zero(size, difference, distance):
    student, teacher, target = make((2, 5, 6, 7), None, size, ignored=1)
    kinds = dict(difference=difference, distance=distance, own=True)
    result = distil(student, teacher, target, selection='all', **kinds)
    assert result.distill_sum == result.distill_weight == result.own_sum == 0
    assert result.counts.sum() == result.correct == 0
    loss = result.distill_sum + result.own_sum
    assert torch.equal(gradient(loss, student), torch.zeros_like(student))


@pytest.mark.parametrize('shape', [(0, 5, 6, 7), (0, 5), (2, 5, 0)])
def test_nothing_at_all(shape):
    student, teacher, target = make(shape)
    result = distil(student, teacher, target, own=True)
    assert result.distill_sum == result.own_sum == 0
    assert gradient(result.distill_sum, student).shape == student.shape


@pytest.mark.parametrize(('difference', 'distance'), KINDS)
def test_nothing_spreads_from_ignored_units(difference, distance):
    student, teacher, target = make()
    kinds = dict(difference=difference, distance=distance, own=True)
    expected = distil(student, teacher, target, **kinds)
    void = (target == 255).unsqueeze(1)
    student = student.detach().masked_fill(void, math.nan).requires_grad_()
    result = distil(student, teacher.masked_fill(void, math.inf), target, **kinds)
    assert result.distill_sum == expected.distill_sum > 0
    assert result.own_sum == expected.own_sum > 0
    found = gradient(result.distill_sum + result.own_sum, student)
    assert found.isfinite().all()
    assert found.masked_select(void).eq(0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [(6, 7), (12, 14)])
def test_half_precision_is_computed_in_float32(dtype, size):
    student, teacher, target = make((2, 5, 6, 7), None, size)
    half, teacher = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    single = half.detach().float().requires_grad_()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        result = distil(half, teacher, target, own=True)
    expected = distil(single, teacher.float(), target, own=True)
    assert result.distill_sum.dtype == torch.float32
    assert result.distill_sum == expected.distill_sum
    assert result.own_sum == expected.own_sum
    found = gradient(result.distill_sum / 10, half)
    assert found.dtype == dtype
    assert torch.equal(found, gradient(expected.distill_sum / 10, single).to(dtype))


@pytest.mark.parametrize('size', [(6, 7), (12, 14)])
def test_memory_layout_does_not_matter(size):
    student, teacher, target = make((2, 5, 6, 7), None, size)
    expected = distil(student, teacher, target)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    turned = teacher.transpose(2, 3).contiguous().transpose(2, 3)
    labels = target.to(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
    found = distil(last, turned, labels)
    torch.testing.assert_close(found.distill_sum, expected.distill_sum)
    torch.testing.assert_close(
        gradient(found.distill_sum, last), gradient(expected.distill_sum, student)
    )


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    align=st.booleans(),
    block_bytes=st.integers(1, 2000),
    scale=st.sampled_from([1.0, 30.0, 1000.0]),
    seed=st.integers(0, 10**6),
)
def test_blocks_do_not_show(height, width, size, align, block_bytes, scale, seed):
    student, teacher, target = make((1, 3, height, width), None, size, seed, torch.float64)
    found, expected = (
        distil(student * scale, teacher, target, student_align_corners=align, block_bytes=amount)
        for amount in (block_bytes, 10**9)
    )
    torch.testing.assert_close(found.distill_sum, expected.distill_sum)
    torch.testing.assert_close(
        gradient(found.distill_sum, student), gradient(expected.distill_sum, student)
    )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(selection='some'), "selection='some'"),
        (dict(temperature=0.0), 'temperature=0.0'),
        (dict(distance='l1'), "distance='l1'"),
        (dict(difference='iou'), "difference='iou'"),
        (dict(class_weight=torch.ones(3)), r'`class_weight`.*\(3,\)'),
        (dict(own=True, own_class_weight=torch.ones(3)), r'\(3,\)'),
        (dict(teacher=torch.zeros(2, 4, 9, 13)), r'\(2, 4, 9, 13\)'),
        (dict(teacher=torch.zeros(2, 5, 9)), r'`teacher`'),
        (dict(target=torch.zeros(3, 9, 13, dtype=torch.long)), r'\(3, 9, 13\)'),
        (dict(target=torch.zeros(2, 9, 13)), 'float32'),
    ],
)
def test_bad_input_is_named(change, message):
    student, teacher, target = make()
    arguments = dict(student=student, teacher=teacher, target=target) | change
    with pytest.raises(ValueError, match=message):
        distil(**arguments)


def test_only_maps_are_upsampled():
    student, teacher, target = make((2, 5, 8), None, (16,))
    with pytest.raises(ValueError, match=r'\(2, 5, 8\)'):
        distil(student, teacher, target)


@pytest.mark.parametrize('size', [(6, 7), (12, 14)])
def test_a_valid_unit_that_is_not_finite_stays_visible(size):
    student, teacher, target = make((2, 5, 6, 7), None, size, ignored=0)
    with torch.no_grad():
        student[0, :, 2, 3] = math.nan
    result = distil(student, teacher, target, selection='all')
    assert result.distill_sum.isnan()
    found = gradient(result.distill_sum, student)
    assert found[0, :, 2, 3].isnan().all()
    assert found[1].isfinite().all()
