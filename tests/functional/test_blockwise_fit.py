import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdistill_ext.functional import (
    fit_loss,
    fit_parts,
    simple_images,
    simple_units,
    unit_difference,
    unit_distillation,
)
from tests.functional.passes import distil

SPLITS = ('unit', 'image')
SIZE = (12, 14)
SIZES = [((12, 14), (12, 14)), ((6, 7), (3, 4)), ((12, 14), (5, 7)), ((4, 5), (24, 20))]
BLOCKS = [4 * 4 * 14, 4 * 4 * 14 * 5, 10**9]  # in float32: a row, five rows, all of an image
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def make(
    channels=4,
    student=SIZE,
    teacher=SIZE,
    size=SIZE,
    images=4,
    seed=0,
    dtype=torch.float32,
    ignored=0.2,
):
    """Random logits; the teacher is right about the later images more often."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, max(channels, 2), (images, *size), generator=generator)
    student = torch.randn(images, channels, *student, generator=generator, dtype=dtype)
    teacher = torch.randn(images, channels, *teacher, generator=generator, dtype=dtype)
    for image in range(images // 2, images):
        if image > images // 2:
            target[image] = image % 2
        if channels > 1:
            teacher[image, image % 2] += 0.75 * image
        else:
            teacher[image] += 0.75 * image * (image % 2 * 2 - 1)
    target[torch.rand(images, *size, generator=generator) < ignored] = 255
    return student.requires_grad_(), teacher, target


def upsample(logits, size):
    if logits.ndim != 4 or logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode='bilinear')


def plain_parts(
    student,
    teacher,
    target,
    split,
    threshold=0.5,
    selection='all',
    difference='ce',
    distance='kl',
    temperature=2.0,
    class_weight=None,
    own_class_weight=None,
):
    """Sums over simple and over hard units, of the distillation and of the cross-entropy."""
    student, teacher = (upsample(x, target.shape[1:]) for x in (student, teacher))
    valid = target != 255
    simple = simple_units(teacher, target)
    if split == 'image':
        simple = simple_images(teacher, target, threshold).view(-1, 1, 1) & valid
    selected = valid
    if selection == 'teacher_better':
        teachers, own = (unit_difference(x, target, difference) for x in (teacher, student))
        selected = valid & (teachers < own)
    label = target.where(valid, 0)
    units = unit_distillation(student, teacher, distance, temperature) * selected
    if class_weight is not None:
        units = units * class_weight[label]
    parts = [torch.stack([(units * part).sum() for part in (simple, ~simple)])]
    if student.shape[1] > 1:
        task = F.cross_entropy(
            student, target, own_class_weight, reduction='none', ignore_index=255
        )
        parts.append(torch.stack([(task * part).sum() for part in (simple, ~simple)]))
    return parts


def run(student, teacher, target, split, **kwargs):
    kwargs = dict(selection='all', temperature=2.0, threshold=0.5, own=True) | kwargs
    return distil(student, teacher, target, split=split, **kwargs)


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def assert_near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ('dtype', 'block_bytes'), [(torch.float32, BLOCKS[0]), (torch.float64, BLOCKS[1])]
)
@pytest.mark.parametrize(('student_size', 'teacher_size'), SIZES)
@pytest.mark.parametrize('hard_weight', [0, 0.3, 1, 2.0])
@pytest.mark.parametrize('split', SPLITS)
def test_equals_the_fit_loss(split, hard_weight, student_size, teacher_size, dtype, block_bytes):
    student, teacher, target = make(4, student_size, teacher_size, dtype=dtype)
    parts = fit_parts(
        upsample(student, SIZE),
        upsample(teacher, SIZE),
        target,
        split=split,
        threshold=0.5,
        temperature=2.0,
        weight=0.7,
    )
    result = run(student, teacher, target, split, hard_weight=hard_weight, block_bytes=block_bytes)
    valid = (target != 255).sum()
    tolerance = TOLERANCE[dtype]
    found = (0.7 * result.distill_parts + result.own_parts) / valid
    assert min(parts) > 0
    assert_near(found, torch.stack(parts).detach(), tolerance)
    found, expected = (
        (0.7 * result.distill_sum + result.own_sum) / valid,
        fit_loss(parts, hard_weight),
    )
    assert_near(found, expected, tolerance)
    # divided by its size, so that the tolerance is one of the gradient and not of 0
    expected = gradient(expected, student)
    scale = expected.abs().max()
    assert_near(gradient(found, student) / scale, expected / scale, tolerance)


@pytest.mark.parametrize('distance', ['kl', 'reverse_kl', 'mse', 'bce'])
@pytest.mark.parametrize('selection', ['all', 'teacher_better'])
@pytest.mark.parametrize('split', SPLITS)
def test_every_selection_and_distance_with_class_weights(split, selection, distance):
    student, teacher, target = make(4, (6, 7), (5, 4))
    options = dict(
        selection=selection,
        distance=distance,
        class_weight=torch.tensor([1.0, 0.0, 2.5, 0.5]),
        own_class_weight=torch.tensor([0.3, 1.0, 0.0, 2.0]),
    )
    distill, task = plain_parts(student, teacher, target, split, **options)
    result = run(student, teacher, target, split, hard_weight=0.3, block_bytes=700, **options)
    assert_near(result.distill_parts, distill.detach())
    assert_near(result.own_parts, task.detach())
    for found, (simple, hard) in ((result.distill_sum, distill), (result.own_sum, task)):
        assert_near(found, simple + 0.3 * hard)
        assert_near(gradient(found, student), gradient(simple + 0.3 * hard, student))


@pytest.mark.parametrize('split', SPLITS)
def test_a_binary_head(split):
    student, teacher, target = make(1, (6, 7), (5, 4))
    kinds = dict(distance='bce', difference='bce')
    (simple, hard), *_ = plain_parts(student, teacher, target, split, **kinds)
    result = run(student, teacher, target, split, hard_weight=2, own=False, **kinds)
    assert result.own_parts is None
    assert min(simple, hard) > 0
    assert_near(result.distill_sum, simple + 2 * hard)
    assert_near(gradient(result.distill_sum, student), gradient(simple + 2 * hard, student))


def test_logits_of_single_units():
    student, teacher, target = (x.detach()[0].flatten(-2) for x in make(4, images=2))
    student, teacher = student.T.contiguous().requires_grad_(), teacher.T.contiguous()
    simple, hard = fit_parts(student, teacher, target, temperature=2.0)
    result = run(student, teacher, target, 'unit', hard_weight=0.3, block_bytes=100)
    found = (result.distill_sum + result.own_sum) / (target != 255).sum()
    assert_near(found, simple + 0.3 * hard)
    assert_near(gradient(found, student), gradient(simple + 0.3 * hard, student))


@pytest.mark.parametrize('split', SPLITS)
def test_text(split):
    student, teacher, target = (x.detach().flatten(-2) for x in make(4))
    student.requires_grad_()
    simple, hard = fit_parts(student, teacher, target, split=split, threshold=0.5, temperature=2.0)
    result = run(student, teacher, target, split, hard_weight=0.3, block_bytes=400)
    found = (result.distill_sum + result.own_sum) / (target != 255).sum()
    assert_near(found, simple + 0.3 * hard)
    assert_near(gradient(found, student), gradient(simple + 0.3 * hard, student))


@pytest.mark.parametrize('hard_weight', [1, 1.0])
@pytest.mark.parametrize('selection', ['all', 'teacher_better'])
@pytest.mark.parametrize('size', [SIZE, (6, 7)])
@pytest.mark.parametrize('split', SPLITS)
def test_weight_1_gives_bit_identical_gradients(split, size, selection, hard_weight):
    student, teacher, target = make(4, size, (6, 7))
    options = dict(selection=selection, block_bytes=700)
    expected = run(student, teacher, target, None, **options)
    found = run(student, teacher, target, split, hard_weight=hard_weight, **options)
    for name in ('distill_sum', 'own_sum'):
        own, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(own, other)
        assert torch.equal(gradient(own, student), gradient(other, student))


@pytest.mark.parametrize('selection', ['all', 'teacher_better'])
def test_only_sums_depend_on_the_split_and_only_they_on_its_weight(selection):
    student, teacher, target = make(4, (6, 7))
    options = dict(
        selection=selection, class_weight=torch.tensor([1.0, 2.0, 3.0, 0.5]), keep_wins=True
    )
    expected = run(student, teacher, target, None, **options)
    assert expected.distill_parts is expected.own_parts is expected.simple_counts is None
    for split in SPLITS:
        results = [
            run(student, teacher, target, split, hard_weight=weight, **options)
            for weight in (0, 0.3, 1, 2.0)
        ]
        for result in results:
            for name in ('distill_weight', 'counts', 'wins', 'correct'):
                assert torch.equal(getattr(result, name), getattr(expected, name)), name
            for name in ('distill_parts', 'own_parts', 'simple_counts'):
                assert torch.equal(getattr(result, name), getattr(results[0], name)), name
                assert not getattr(result, name).requires_grad
            assert_near(result.distill_parts.sum(), expected.distill_sum.detach())
            assert_near(result.own_parts.sum(), expected.own_sum.detach())


@pytest.mark.parametrize('block_bytes', BLOCKS)
@pytest.mark.parametrize('split', SPLITS)
def test_simple_samples_are_counted(split, block_bytes):
    student, teacher, target = make(4, (6, 7), (5, 4))
    target[0] = 255  # an image without a valid unit is no sample
    found = run(student, teacher, target, split, block_bytes=block_bytes).simple_counts
    teacher = upsample(teacher, SIZE)
    if split == 'unit':
        expected = [simple_units(teacher, target).sum(), (target != 255).sum()]
    else:
        expected = [simple_images(teacher, target, 0.5)[1:].sum(), 3]
    assert found.tolist() == expected
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('right', [15, 14, 7])
def test_an_image_with_exactly_the_threshold_is_simple(right, dtype):
    target = torch.zeros(1, 25, dtype=torch.long)
    teacher = torch.zeros(1, 2, 25, dtype=dtype)
    teacher[0, 1, right:] = 1
    assert run(teacher, teacher, target, 'image', threshold=right / 25).simple_counts.tolist() == [
        1,
        1,
    ]
    above = run(teacher, teacher, target, 'image', threshold=(right + 0.5) / 25)
    assert above.simple_counts.tolist() == [0, 1]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('teacher_value', [0.0, math.nan])
def test_nothing_spreads_from_hard_units_of_weight_0(value, teacher_value):
    student, teacher, target = make(4)
    valid = target != 255
    dropped = ~simple_units(teacher, target).unsqueeze(1)  # hard and void
    expected = run(student, teacher, target, 'unit', hard_weight=0)
    own = expected.distill_sum + expected.own_sum
    own_gradient = gradient(own, student)
    student = student.detach().masked_fill(dropped, value).requires_grad_()
    label = target.where(valid, 0)
    wrong = -F.one_hot(label, 4).movedim(-1, 1).float() + teacher_value
    result = run(student, teacher.where(~dropped, wrong), target, 'unit', hard_weight=0)
    found = result.distill_sum + result.own_sum
    assert found == own > 0
    assert torch.equal(gradient(found, student), own_gradient)
    assert own_gradient.masked_select(dropped).eq(0).all()
    assert result.distill_parts[0].isfinite()
    assert not result.distill_parts[1].isfinite()


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('size', [SIZE, (6, 7)])
@pytest.mark.parametrize('split', SPLITS)
def test_nothing_spreads_from_hard_images_of_weight_0(split, size, value):
    student, teacher, target = make(4, size, size)
    with torch.no_grad():  # the teacher errs all over the first image
        target[0] = 0
        teacher[0, 0] = -9
    expected = run(student, teacher, target, split, hard_weight=0)
    own = expected.distill_sum + expected.own_sum
    own_gradient = gradient(own, student)
    with torch.no_grad():
        student[0] = value
    result = run(student, teacher, target, split, hard_weight=0)
    found = result.distill_sum + result.own_sum
    assert found == own > 0
    assert torch.equal(gradient(found, student), own_gradient)
    assert own_gradient[0].eq(0).all()


@pytest.mark.parametrize('split', SPLITS)
def test_a_hard_unit_that_counts_and_is_not_finite_stays_visible(split):
    student, teacher, target = make(4, ignored=0)
    with torch.no_grad():
        target[0] = 0
        teacher[0, 0] = -9
        student[0, :, 2, 3] = math.nan
    result = run(student, teacher, target, split, hard_weight=0.5)
    for loss in (result.distill_sum, result.own_sum):
        assert loss.isnan()
        found = gradient(loss, student)
        assert found[0, :, 2, 3].isnan().all()
        assert found[1:].isfinite().all()


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('size', [SIZE, (6, 7)])
def test_all_ignored_is_exactly_zero(size, split):
    student, teacher, target = make(4, size, ignored=2)
    result = run(student, teacher, target, split, hard_weight=0.3)
    assert result.distill_sum == result.own_sum == 0
    for name in ('distill_parts', 'own_parts', 'simple_counts'):
        assert torch.equal(getattr(result, name), torch.zeros(2))
    loss = result.distill_sum + result.own_sum
    assert torch.equal(gradient(loss, student), torch.zeros_like(student))


@pytest.mark.parametrize(
    ('shape', 'split'),
    [
        *((shape, split) for shape in ((0, 5, 6, 7), (2, 5, 0)) for split in SPLITS),
        ((0, 5), 'unit'),
    ],
)
def test_nothing_at_all(shape, split):
    student = torch.zeros(shape, requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    result = run(student, student.detach(), target, split, hard_weight=0.3)
    assert result.distill_sum == result.own_sum == 0
    assert result.simple_counts.tolist() == [0, 0]
    assert gradient(result.distill_sum + result.own_sum, student).shape == student.shape


def test_rows_are_no_images():
    logits, target = torch.zeros(6, 5), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`split='image'` needs images.*\(6,\)"):
        run(logits, logits, target, 'image')


@pytest.mark.parametrize('size', [(2, 3), (4, 6)])
@pytest.mark.parametrize('split', SPLITS)
def test_gradcheck(split, size):
    student, teacher, target = make(3, (2, 3), (2, 3), size, images=2, dtype=torch.float64)

    def function(x):
        result = run(x, teacher, target, split, hard_weight=0.3, block_bytes=100)
        return result.distill_sum, result.own_sum

    assert torch.autograd.gradcheck(function, student)


@pytest.mark.parametrize('split', SPLITS)
def test_half_precision_is_computed_in_float32(split):
    student, teacher, target = make(4, (6, 7))
    half, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    single = half.detach().float().requires_grad_()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        found = run(half, teacher, target, split, hard_weight=0.3)
    expected = run(single, teacher.float(), target, split, hard_weight=0.3)
    assert found.distill_parts.dtype == found.own_parts.dtype == torch.float32
    for name in ('distill_sum', 'own_sum'):
        own, other = getattr(found, name), getattr(expected, name)
        assert own == other
        assert torch.equal(gradient(own, half), gradient(other, single).bfloat16())


@pytest.mark.parametrize('split', SPLITS)
def test_without_gradient_the_sums_are_the_same(split):
    student, teacher, target = make(4, (6, 7))
    expected = run(student, teacher, target, split, hard_weight=0.3)
    with torch.no_grad():
        found = run(student, teacher, target, split, hard_weight=0.3)
    for name in ('distill_sum', 'own_sum', 'distill_parts', 'own_parts', 'simple_counts'):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert not getattr(found, name).requires_grad


@settings(max_examples=25)
@given(
    student=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    block_bytes=st.integers(1, 2000),
    split=st.sampled_from(SPLITS),
    hard_weight=st.floats(0, 3),
    threshold=st.floats(0.01, 1),
    seed=st.integers(0, 10**6),
)
def test_blocks_do_not_show(student, size, block_bytes, split, hard_weight, threshold, seed):
    inputs = make(3, student, (4, 5), size, images=2, seed=seed, dtype=torch.float64)
    found, expected = (
        run(
            *inputs,
            split,
            hard_weight=hard_weight,
            threshold=threshold,
            selection='teacher_better',
            block_bytes=amount,
        )
        for amount in (block_bytes, 10**9)
    )
    assert torch.equal(found.simple_counts, expected.simple_counts)
    assert_near(found.distill_parts, expected.distill_parts, 1e-9)
    assert_near(found.own_parts, expected.own_parts, 1e-9)
    for name in ('distill_sum', 'own_sum'):
        own, other = (gradient(getattr(x, name), inputs[0]) for x in (found, expected))
        assert_near(own, other, 1e-9)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(split='pixel'), "`split` should be one of unit, image. Found split='pixel'"),
        (dict(split=True), 'split=True'),
        (dict(threshold=0), r'`threshold` should be in \(0, 1\]. Found threshold=0'),
        (dict(threshold=1.5), 'threshold=1.5'),
        (dict(threshold=math.nan), 'threshold=nan'),
        (dict(threshold='0.9'), "threshold='0.9'"),
        (dict(hard_weight=-0.1), '`hard_weight` should be .* >= 0, .* Found hard_weight=-0.1'),
        (dict(hard_weight=math.nan), 'hard_weight=nan'),
        (dict(hard_weight=math.inf), 'hard_weight=inf'),
        (dict(hard_weight='1'), "hard_weight='1'"),
        (dict(hard_weight=None), 'hard_weight=None'),
    ],
)
def test_bad_values_are_named(change, message):
    student, teacher, target = make(4)
    with pytest.raises(ValueError, match=message):
        distil(student, teacher, target, **(dict(split='image') | change))


@pytest.mark.parametrize('block_bytes', BLOCKS)
@pytest.mark.parametrize('split', SPLITS)
def test_given_simple_units_take_the_place_of_the_logits_answer(split, block_bytes):
    student, teacher, target = make(4)
    given = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    kwargs = dict(hard_weight=0.3, block_bytes=block_bytes)
    found = run(student, teacher, target, split, simple=given, threshold=1.0, **kwargs)
    valid = target != 255
    log = [(x / 2).log_softmax(1) for x in (student, teacher)]
    distill = 4 * F.kl_div(*log, reduction='none', log_target=True).sum(1)
    task = F.cross_entropy(student, target, reduction='none', ignore_index=255)
    for name, units in (('distill', distill), ('own', task)):
        parts = torch.stack([units[given & valid].sum(), units[~given & valid].sum()])
        total = parts[0] + 0.3 * parts[1]
        assert_near(getattr(found, f'{name}_parts'), parts.detach(), 1e-4)
        assert_near(getattr(found, f'{name}_sum'), total, 1e-4)
        assert_near(gradient(getattr(found, f'{name}_sum'), student), gradient(total, student))
    assert found.simple_counts.tolist() == [(given & valid).sum(), valid.sum()]


def test_the_logits_own_answer_may_be_given():
    student, teacher, target = make(4)
    expected = run(student, teacher, target, 'unit', hard_weight=0.3)
    given = simple_units(teacher, target)
    found = run(student, teacher, target, 'image', simple=given, hard_weight=0.3)
    assert torch.equal(found.distill_sum, expected.distill_sum)
    assert torch.equal(found.distill_parts, expected.distill_parts)
    assert torch.equal(found.simple_counts, expected.simple_counts)


@pytest.mark.parametrize('shape', [(4, 12, 13), (3, 12, 14), (4,), (4, 1, 1)])
def test_simple_units_of_another_shape_are_refused(shape):
    student, teacher, target = make(4)
    with pytest.raises(ValueError, match=r'`simple` should have the shape of the labels, \(4, 12'):
        run(student, teacher, target, 'unit', simple=torch.ones(shape, dtype=torch.bool))
