import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import (
    unit_difference,
    unit_distillation,
)
from tests.functional.passes import distil

CLASSES, UNITS = 4, 37
IGNORED = -1


def make(seed=0, dtype=torch.float32, spread=3.0, shape=(3, UNITS)):
    """Logits of both, labels 0..C with C background and some ignored, costs of both to be added."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype) * spread

    logits = (shape[0], CLASSES, *shape[1:])
    student, teacher = draw(*logits).requires_grad_(), draw(*logits)
    labels = torch.randint(IGNORED, CLASSES + 1, shape, generator=generator)
    costs = torch.rand(2, *shape, generator=generator, dtype=dtype)
    return student, teacher, labels, costs


def reference(logits, labels):
    """Binary cross-entropy with one-hot targets; those of background are all 0."""
    one_hot = F.one_hot(labels.clamp(min=0), CLASSES + 1)[..., :CLASSES].to(logits.dtype)
    targets = one_hot.movedim(-1, 1)
    units = F.binary_cross_entropy_with_logits(logits, targets, reduction='none').sum(1)
    return units * (labels != IGNORED)


@pytest.mark.parametrize('shape', [(3, UNITS), (2, 5, 6), (41,)])
def test_difference_is_binary_cross_entropy(shape):
    student, _, labels, _ = make(shape=shape, dtype=torch.float64)
    found = unit_difference(student, labels, 'bce', IGNORED, background=True)
    expected = reference(student, labels)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((x * weights).sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert (labels == CLASSES).any()
    assert (labels == IGNORED).any()


def test_background_is_the_sum_over_all_classes():
    logits = torch.tensor([[0.0, 2.0]]).T[None].expand(1, 2, 1)
    found = unit_difference(logits, torch.tensor([[2]]), 'bce', IGNORED, background=True)
    torch.testing.assert_close(
        found, F.softplus(torch.tensor([[0.0]])) + F.softplus(torch.tensor(2.0))
    )


def test_values_that_are_not_finite_on_ignored_units_do_not_spread():
    student, _, labels, _ = make()
    ignored = labels == IGNORED
    for bad in (float('nan'), float('inf')):
        logits = student.detach().clone()
        logits.movedim(1, -1)[ignored] = bad
        logits.requires_grad_()
        found = unit_difference(logits, labels, 'bce', IGNORED, background=True)
        torch.testing.assert_close(found, reference(student, labels))
        found.sum().backward()
        assert logits.grad.isfinite().all()
        assert (logits.grad.movedim(1, -1)[ignored] == 0).all()


def test_gradcheck():
    student, _, labels, _ = make(dtype=torch.float64, shape=(2, 9))
    assert torch.autograd.gradcheck(
        lambda x: unit_difference(x, labels, 'bce', IGNORED, background=True), student
    )


def plain(student, teacher, labels, extras, selection, distance, class_weight=None):
    """The same sums without blocks."""
    task, other = (
        reference(x.detach(), labels) + (0 if extra is None else extra)
        for x, extra in zip((student, teacher), extras, strict=True)
    )
    valid = labels != IGNORED
    wins = (other < task) & valid
    weight = (wins if selection == 'teacher_better' else valid).to(student.dtype)
    if class_weight is not None:
        weight = weight * class_weight[labels.clamp(min=0)]
    if distance == 'mse':
        units = ((student - teacher) ** 2).mean(1)
    else:
        p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
        units = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1) * 4
    counts = torch.tensor(
        [[(mask & (labels == c)).sum() for c in range(CLASSES + 1)] for mask in (valid, wins)]
    )
    return (units * weight).sum(), weight.sum(), wins, counts


EXTRAS = {
    'none': lambda costs: (None, None),
    'both': lambda costs: tuple(costs),
    'student': lambda costs: (costs[0], None),
    'teacher': lambda costs: (None, costs[1]),
}


@pytest.mark.parametrize('block_bytes', [1, 8 * CLASSES * 10, 10**9])
@pytest.mark.parametrize('selection', ['teacher_better', 'all'])
@pytest.mark.parametrize('extras', EXTRAS)
def test_blockwise_equals_the_plain_sums(extras, selection, block_bytes):
    student, teacher, labels, costs = make(dtype=torch.float64, spread=1.0)
    class_weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    costs = EXTRAS[extras](costs)
    for distance in ('bce', 'mse'):
        for weight in (None, class_weight):
            expected = plain(student, teacher, labels, costs, selection, distance, weight)
            result = distil(
                student,
                teacher,
                labels,
                selection=selection,
                difference='bce',
                distance=distance,
                temperature=2.0,
                ignore_index=IGNORED,
                class_weight=weight,
                background=True,
                student_extra=costs[0],
                teacher_extra=costs[1],
                keep_wins=True,
                block_bytes=block_bytes,
            )
            torch.testing.assert_close(result.distill_sum, expected[0])
            torch.testing.assert_close(result.distill_weight, expected[1])
            assert torch.equal(result.wins, expected[2])
            assert torch.equal(result.counts, expected[3])
            gradients = [
                torch.autograd.grad(x, student)[0] for x in (result.distill_sum, expected[0])
            ]
            torch.testing.assert_close(*gradients)
    assert result.counts.shape == (2, CLASSES + 1)
    assert result.counts[0, CLASSES] > 0


def test_extras_change_who_wins():
    """Else the test above would compare nothing."""
    student, teacher, labels, costs = make(spread=1.0)
    found = []
    for build in EXTRAS.values():
        wins = plain(student, teacher, labels, build(costs), 'all', 'bce')[2]
        found.append(wins.flatten().tolist())
    assert len({tuple(wins) for wins in found}) == len(EXTRAS)


@pytest.mark.parametrize('shape', [(2, 3, 5), (11,)])
def test_extras_of_any_shape(shape):
    student, teacher, labels, costs = make(shape=shape)
    result = distil(
        student,
        teacher,
        labels,
        difference='bce',
        distance='bce',
        ignore_index=IGNORED,
        background=True,
        student_extra=costs[0],
        teacher_extra=costs[1],
        keep_wins=True,
        block_bytes=1,
    )
    own, other = (
        reference(x.detach(), labels) + c for x, c in zip((student, teacher), costs, strict=True)
    )
    wins = (other < own) & (labels != IGNORED)
    assert torch.equal(result.wins, wins)
    torch.testing.assert_close(
        result.distill_sum, (unit_distillation(student, teacher, 'bce') * wins).sum()
    )


def test_bad_extras_on_ignored_units_do_not_spread():
    student, teacher, labels, costs = make()
    ignored = labels == IGNORED
    kwargs = dict(difference='bce', distance='bce', ignore_index=IGNORED, background=True)
    bad = [cost.masked_fill(ignored, float('nan')) for cost in costs]
    sums = [
        distil(student, teacher, labels, student_extra=own, teacher_extra=other, **kwargs)
        for own, other in (costs, bad)
    ]
    assert sums[0].distill_sum == sums[1].distill_sum > 0
    assert torch.equal(sums[0].counts, sums[1].counts)


def test_blockwise_gradcheck():
    student, teacher, labels, costs = make(dtype=torch.float64, shape=(2, 8))
    margin = plain(student, teacher, labels, costs, 'all', 'bce')[2]
    assert margin.any()
    assert torch.autograd.gradcheck(
        lambda x: (
            distil(
                x,
                teacher,
                labels,
                difference='bce',
                distance='bce',
                ignore_index=IGNORED,
                background=True,
                student_extra=costs[0],
                teacher_extra=costs[1],
                block_bytes=64,
            ).distill_sum
        ),
        student,
    )


def test_one_class_is_no_binary_segmenter():
    """With background, one channel has the labels 0 (the class) and 1 (background)."""
    logits = torch.tensor([[[2.0, 2.0, 2.0]]])
    labels = torch.tensor([[0, 1, IGNORED]])
    found = unit_difference(logits, labels, 'bce', IGNORED, background=True)
    expected = F.binary_cross_entropy_with_logits(
        logits[0, 0, :2], torch.tensor([1.0, 0.0]), reduction='none'
    )
    torch.testing.assert_close(found[0, :2], expected)
    result = distil(
        logits,
        -logits,
        labels,
        difference='bce',
        distance='bce',
        ignore_index=IGNORED,
        background=True,
    )
    assert result.counts.tolist() == [[1, 1], [0, 1]]


def test_class_weights_count_background():
    student, teacher, labels, _ = make()
    with pytest.raises(ValueError, match=r'\(5,\).*\(4,\)'):
        distil(
            student,
            teacher,
            labels,
            difference='bce',
            distance='bce',
            ignore_index=IGNORED,
            background=True,
            class_weight=torch.ones(4),
        )


def test_background_needs_binary_differences():
    student, teacher, labels, _ = make()
    with pytest.raises(ValueError, match="background.*'ce'"):
        unit_difference(student, labels, 'ce', IGNORED, background=True)
    with pytest.raises(ValueError, match="background.*'ce'"):
        distil(student, teacher, labels, distance='bce', ignore_index=IGNORED, background=True)


@pytest.mark.parametrize('name', ['student.extra', 'teacher.extra'])
@pytest.mark.parametrize('shape', [(3, UNITS + 1), (4, UNITS), (UNITS, 3), (3, 1), (3,)])
def test_extras_of_another_shape_are_refused_by_name(name, shape):
    student, teacher, labels, _ = make()
    with pytest.raises(ValueError, match=rf'`{name}`'):
        distil(
            student,
            teacher,
            labels,
            difference='bce',
            distance='bce',
            ignore_index=IGNORED,
            background=True,
            **{name.replace('.', '_'): torch.zeros(shape)},
        )


KINDS = dict(difference='bce', distance='bce', ignore_index=IGNORED, background=True)


@pytest.mark.parametrize('hard_weight', [0, 0.3, 1])
@pytest.mark.parametrize('selection', ['all', 'teacher_better'])
def test_given_simple_units_split_the_sum(selection, hard_weight):
    student, teacher, labels, costs = make(dtype=torch.float64)
    simple = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    found = distil(
        student,
        teacher,
        labels,
        selection=selection,
        split='image',
        simple=simple,
        hard_weight=hard_weight,
        student_extra=costs[0],
        teacher_extra=costs[1],
        block_bytes=1,
        **KINDS,
    )
    own, other = (
        reference(x.detach(), labels) + c for x, c in zip((student, teacher), costs, strict=True)
    )
    valid = labels != IGNORED
    selected = valid & ((other < own) | (selection == 'all'))
    units = unit_distillation(student, teacher, 'bce') * selected
    parts = torch.stack([units[simple].sum(), units[~simple].sum()])
    total = parts[0] + hard_weight * parts[1]
    torch.testing.assert_close(found.distill_parts, parts.detach())
    torch.testing.assert_close(found.distill_sum, total)
    gradients = [torch.autograd.grad(x, student)[0] for x in (found.distill_sum, total)]
    torch.testing.assert_close(*gradients)
    assert found.simple_counts.tolist() == [(simple & valid).sum(), valid.sum()]
    assert found.distill_weight == selected.sum()
    assert parts.min() > 0


@pytest.mark.parametrize('split', ['unit', 'image'])
def test_a_split_needs_to_be_told_what_is_simple(split):
    student, teacher, labels, _ = make()
    with pytest.raises(ValueError, match='`split` of a detector needs `simple`.*None'):
        distil(student, teacher, labels, split=split, **KINDS)
