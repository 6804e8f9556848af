import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmdistill_ext.functional import (
    FitParts,
    exponential_fit,
    fit_loss,
    fit_parts,
    fitting_error,
    logistic_fit,
    simple_images,
    simple_units,
    unit_distillation,
)

DISTANCES = ('kl', 'reverse_kl', 'mse', 'bce')


def softmax(x):
    return x.exp() / x.exp().sum()


def plain_distance(s, t, kind, temperature):
    """One unit, in probabilities: ``s`` and ``t`` are (C,)."""
    if kind == 'mse':
        return ((s - t) ** 2).mean()
    s, t = s / temperature, t / temperature
    if kind == 'bce':
        q, p = 1 / (1 + (-s).exp()), 1 / (1 + (-t).exp())
        return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    q, p = softmax(s), softmax(t)
    if kind == 'reverse_kl':
        p, q = q, p
    return temperature**2 * (p * (p / q).log()).sum()


def units_of(logits, image):
    """Logits of one image as rows, (units, C)."""
    return logits[image].flatten(1).T


def plain_right(teacher, label):
    """Whether the teacher is right about one valid unit; one channel is a binary head."""
    if len(teacher) == 1:
        return (1 if teacher[0] > 0 else 0) == label
    return all(teacher[label] >= other for other in teacher)


def plain_simple_images(teacher, target, threshold, ignore_index=255):
    """Counts, unit by unit."""
    found = []
    for image, labels in enumerate(target.flatten(1).tolist()):
        rows = list(zip(units_of(teacher, image), labels, strict=True))
        right = [plain_right(row, label) for row, label in rows if label != ignore_index]
        found.append(not right or sum(right) / len(right) >= threshold)
    return found


def plain_parts(
    student,
    teacher,
    target,
    split='unit',
    threshold=0.9,
    distance='kl',
    temperature=1.0,
    weight=1.0,
    ignore_index=255,
):
    """Both parts, unit by unit."""
    images = plain_simple_images(teacher, target, threshold, ignore_index)
    sums, valid = [0.0, 0.0], 0
    for image, labels in enumerate(target.flatten(1).tolist()):
        rows = zip(units_of(student, image), units_of(teacher, image), labels, strict=True)
        for s, t, label in rows:
            if label == ignore_index:
                continue
            valid += 1
            simple = plain_right(t, label) if split == 'unit' else images[image]
            loss = weight * plain_distance(s, t, distance, temperature) - softmax(s)[label].log()
            sums[0 if simple else 1] += loss.item()
    return [total / max(valid, 1) for total in sums]


def make(shape=(3, 4, 9), dtype=torch.float64, seed=0, ignored=0.2, ignore_index=255, right=0.5):
    """Random logits; the teacher leans towards the label, image by image more."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=dtype)
    teacher = torch.randn(shape, generator=generator, dtype=dtype)
    size = (shape[0], *shape[2:])
    target = torch.randint(0, max(shape[1], 2), size, generator=generator)
    if shape[1] > 1:
        lean = right * torch.arange(shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1))
        teacher = teacher + lean * F.one_hot(target, shape[1]).movedim(-1, 1)
    target[torch.rand(size, generator=generator) < ignored] = ignore_index
    return student.requires_grad_(), teacher, target


SHAPES = [(3, 4, 3, 5), (3, 4, 9), (3, 4, 2, 2, 3)]  # maps, text, volumes


@pytest.mark.parametrize('ignore_index', [255, 1])
@pytest.mark.parametrize('channels', [1, 2, 4])
def test_simple_units_are_those_that_the_teacher_gets_right(channels, ignore_index):
    _, teacher, target = make((3, channels, 4, 5), ignore_index=ignore_index)
    found = simple_units(teacher, target, ignore_index)
    assert found.dtype == torch.bool
    assert found.shape == target.shape
    for image in range(3):
        labels = target[image].flatten().tolist()
        expected = [
            label != ignore_index and bool(plain_right(row, label))
            for row, label in zip(units_of(teacher, image), labels, strict=True)
        ]
        assert found[image].flatten().tolist() == expected
    assert 0 < found.sum() < (target != ignore_index).sum()


def test_known_simple_units():
    teacher = torch.tensor([[[1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 5.0]]])
    target = torch.tensor([[0, 0, 1, 255]])
    assert simple_units(teacher, target).tolist() == [[True, False, True, False]]  # a tie is right
    binary, target = torch.tensor([[[3.0, 3.0, -3.0, -3.0, 0.0, 0.0]]]), [[1, 0, 0, 1, 0, 1]]
    found = simple_units(binary, torch.tensor(target))
    assert found.tolist() == [[True, False, True, False, True, False]]


def test_a_teacher_that_is_not_finite_is_not_right():
    teacher = torch.full((1, 3, 2), math.nan)
    assert not simple_units(teacher, torch.tensor([[0, 2]])).any()


@pytest.mark.parametrize('threshold', [0.01, 0.3, 0.5, 0.9, 1, 1.0])
@pytest.mark.parametrize('shape', SHAPES)
def test_simple_images_are_those_with_enough_simple_units(shape, threshold):
    _, teacher, target = make(shape, right=1.0)
    found = simple_images(teacher, target, threshold)
    assert found.tolist() == plain_simple_images(teacher, target, threshold)


@pytest.mark.parametrize('units', [25, 50, 100])
def test_an_image_with_exactly_the_threshold_is_simple(units):
    target = torch.zeros(1, units, dtype=torch.long)
    for right in range(1, units + 1):
        teacher = torch.zeros(1, 2, units)
        teacher[0, 1, right:] = 1
        assert simple_images(teacher, target, right / units).item(), right
        if right < units:
            assert not simple_images(teacher, target, (right + 0.5) / units).item(), right


def test_an_image_without_a_valid_unit_is_simple():
    teacher = torch.zeros(2, 3, 4)
    target = torch.full((2, 4), 255)
    assert simple_images(teacher, target, 1.0).tolist() == [True, True]


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('shape', SHAPES)
def test_parts_equal_the_formula_unit_by_unit(shape, split, distance):
    inputs = make(shape)
    options = dict(split=split, threshold=0.4, distance=distance, temperature=2.0, weight=0.7)
    found = fit_parts(*inputs, **options)
    assert [part.item() for part in found] == pytest.approx(plain_parts(*inputs, **options))
    assert min(found) > 0


@pytest.mark.parametrize('split', ['unit', 'image'])
def test_another_ignore_index(split):
    inputs = make(ignore_index=2)
    options = dict(split=split, threshold=0.4, ignore_index=2)
    found = fit_parts(*inputs, **options)
    assert [part.item() for part in found] == pytest.approx(plain_parts(*inputs, **options))


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('distance', DISTANCES)
def test_the_sum_of_the_parts_is_plain_distillation(distance, split):
    student, teacher, target = make((3, 4, 5, 6))
    options = dict(distance=distance, temperature=3.0)
    parts = fit_parts(student, teacher, target, split=split, threshold=0.4, weight=0.3, **options)
    valid = target != 255
    units = unit_distillation(student, teacher, distance, 3.0)
    expected = 0.3 * units[valid].mean() + F.cross_entropy(student, target, ignore_index=255)
    for own in (parts.soft + parts.hard, fit_loss(parts, 1), fit_loss(parts, torch.tensor(1.0))):
        torch.testing.assert_close(own, expected)
    own, other = (
        torch.autograd.grad(x, student, retain_graph=True)[0] for x in (sum(parts), expected)
    )
    torch.testing.assert_close(own, other)


def test_the_hard_part_is_weighed():
    parts = FitParts(torch.tensor(2.0), torch.tensor(3.0))
    assert fit_loss(parts, 0) == 2
    assert fit_loss(parts, 0.5) == 3.5
    assert fit_loss(parts, torch.tensor(2.0)) == 8


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('right', [True, False])
def test_without_simple_or_hard_units_that_part_is_exactly_zero(right, split):
    student, _, target = make((2, 4, 6), ignored=0.3)
    teacher = 9.0 * F.one_hot(target.where(target != 255, 0), 4).movedim(-1, 1).double()
    teacher = teacher if right else -teacher
    parts = fit_parts(student, teacher, target, split=split)
    empty, full = reversed(parts) if right else parts
    assert empty == 0 < full
    (gradient,) = torch.autograd.grad(empty, student)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('shape', [(2, 5, 7), (0, 5, 6, 7), (2, 5, 0)])
def test_all_ignored_or_empty_is_exactly_zero(shape, split):
    student, teacher, target = make(shape, ignored=2)
    parts = fit_parts(student, teacher, target, split=split)
    assert parts == (0, 0)
    (gradient,) = torch.autograd.grad(sum(parts), student)
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('distance', DISTANCES)
def test_nothing_spreads_from_ignored_units(distance, split):
    student, teacher, target = make()
    expected = fit_parts(student, teacher, target, split=split, distance=distance, threshold=0.4)
    void = (target == 255).unsqueeze(1)
    student = student.detach().masked_fill(void, math.nan).requires_grad_()
    teacher = teacher.masked_fill(void, math.inf)
    found = fit_parts(student, teacher, target, split=split, distance=distance, threshold=0.4)
    assert found == expected
    (gradient,) = torch.autograd.grad(sum(found), student)
    assert gradient.isfinite().all()
    assert gradient.masked_select(void).eq(0).all()


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('distance', DISTANCES)
def test_gradcheck(split, distance):
    student, teacher, target = make((2, 3, 5))
    teacher.requires_grad_()  # taken as constant all the same

    def function(x):
        return tuple(
            fit_parts(
                x, teacher, target, split=split, threshold=0.5, distance=distance, temperature=1.5
            )
        )

    assert torch.autograd.gradcheck(function, student)
    sum(function(student)).backward()
    assert teacher.grad is None


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, target = make((2, 5, 40), torch.float32)
    half = student.detach().to(dtype).requires_grad_()
    single, teacher = half.detach().float().requires_grad_(), teacher.to(dtype)
    found = fit_parts(half, teacher, target, temperature=2.0)
    expected = fit_parts(single, teacher.float(), target, temperature=2.0)
    assert found == expected
    assert found.soft.dtype == found.hard.dtype == torch.float32
    sum(found).backward(), sum(expected).backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize('split', ['unit', 'image'])
def test_memory_layout_and_type_of_labels_do_not_matter(split):
    student, teacher, target = make((3, 4, 5, 6))
    expected = fit_parts(student, teacher, target, split=split, threshold=0.4)
    last = student.detach().to(memory_format=torch.channels_last)
    turned = teacher.transpose(2, 3).contiguous().transpose(2, 3)
    labels = target.to(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
    found = fit_parts(last, turned, labels, split=split, threshold=0.4)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


EXPONENTIAL = [  # x, b, f_max, F
    (0.0, 10.0, 2.0, 1.0),
    (-1.0, 10.0, 2.0, 0.1),
    (-2.0, 4.0, 2.0, 0.0625),
    (-0.5, 4.0, 2.0, 0.5),
    (0.5, 4.0, 3.0, 2.0),
    (0.5, 4.0, 2.0, 2.0),
    (1.0, 10.0, 2.0, 2.0),
    (0.0, 10.0, 0.5, 0.5),
]
LOGISTIC = [  # x, b, F
    (0.0, 10.0, 1.0),
    (-1.0, 9.0, 0.2),
    (1.0, 9.0, 1.8),
    (-1.0, 3.0, 0.5),
    (2.0, 3.0, 1.8),
]


@pytest.mark.parametrize(('x', 'b', 'f_max', 'expected'), EXPONENTIAL)
def test_exponential_values(x, b, f_max, expected):
    assert exponential_fit(x, b, f_max) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(('x', 'b', 'expected'), LOGISTIC)
def test_logistic_values(x, b, expected):
    assert logistic_fit(x, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('b', [1.0001, 2, 10.0, 1e6])
def test_limits(b):
    assert exponential_fit(0.0, b) == logistic_fit(0.0, b) == 1
    for huge in (1e8, 1e300):
        assert exponential_fit(huge, b) == logistic_fit(huge, b) == 2
        assert exponential_fit(-huge, b) == logistic_fit(-huge, b) == 0


@given(
    first=st.floats(-1e3, 1e3),
    second=st.floats(-1e3, 1e3),
    b=st.floats(1.001, 1e4),
    f_max=st.floats(0.01, 100),
)
def test_the_functions_rise_within_their_bounds(first, second, b, f_max):
    low, high = sorted((first, second))
    assert 0 <= exponential_fit(low, b, f_max) <= exponential_fit(high, b, f_max) <= f_max
    assert 0 <= logistic_fit(low, b) <= logistic_fit(high, b) <= 2
    assert logistic_fit(low, b) + logistic_fit(-low, b) == pytest.approx(2)


@pytest.mark.parametrize('function', [exponential_fit, logistic_fit])
@pytest.mark.parametrize('b', [1, 1.0, 0.5, 0, -2.0, math.nan, math.inf, '10', True, None])
def test_a_bad_base_is_named(function, b):
    with pytest.raises(ValueError, match=f'`b` should be a finite number > 1. Found b={b!r}'):
        function(0.1, b)


@pytest.mark.parametrize('f_max', [0, 0.0, -1.0, math.nan, math.inf, '2', True])
def test_a_bad_bound_is_named(f_max):
    with pytest.raises(ValueError, match=f'`f_max` should be .*> 0. Found f_max={f_max!r}'):
        exponential_fit(0.1, 10.0, f_max)


def test_fitting_error_is_training_minus_validation():
    assert fitting_error(0.25, 1.0) == -0.75
    assert fitting_error(1.0, 1.0) == 0
    assert isinstance(fitting_error(1, 0), (int, float))


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_no_fitting_error(value):
    with pytest.raises(ValueError, match=f'`train_gt_loss` should be finite. Found {value}'):
        fitting_error(value, 1.0)
    with pytest.raises(ValueError, match=f'`val_gt_loss` should be finite. Found {value}'):
        fitting_error(1.0, value)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(split='pixel'), "`split` should be one of unit, image. Found split='pixel'"),
        (dict(distance='l1'), "distance='l1'"),
        (dict(temperature=0.0), 'temperature=0.0'),
        (dict(teacher=torch.zeros(2, 4, 7)), r'\(2, 4, 7\)'),
        (dict(teacher=torch.zeros(2, 5, 6)), r'\(2, 5, 6\)'),
        (dict(teacher=torch.zeros(2, 5, 7, dtype=torch.long)), '`teacher`.*int64'),
        (dict(target=torch.zeros(2, 6, dtype=torch.long)), r'\(2, 6\)'),
        (dict(target=torch.zeros(2, 7)), 'float32'),
        (dict(target=torch.zeros(2, 7, dtype=torch.bool)), 'bool'),
    ],
)
def test_bad_input_is_named(change, message):
    student, teacher, target = make((2, 5, 7), torch.float32)
    arguments = dict(student=student, teacher=teacher, target=target) | change
    with pytest.raises(ValueError, match=message):
        fit_parts(**arguments)


@pytest.mark.parametrize('threshold', [0, 0.0, -0.1, 1.5, 2, math.nan, math.inf, '0.9', True, None])
def test_a_bad_threshold_is_named(threshold):
    student, teacher, target = make((2, 5, 7), torch.float32)
    message = rf'`threshold` should be in \(0, 1\]. Found threshold={threshold!r}'
    with pytest.raises(ValueError, match=message):
        simple_images(teacher, target, threshold)
    with pytest.raises(ValueError, match=message):
        fit_parts(student, teacher, target, split='image', threshold=threshold)


def test_a_binary_head_has_no_softmax_cross_entropy():
    student, teacher, target = make((2, 1, 7), torch.float32)
    with pytest.raises(ValueError, match="difference='ce'"):
        fit_parts(student, teacher, target, distance='bce')
