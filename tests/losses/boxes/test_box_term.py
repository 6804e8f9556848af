import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.losses import KDLoss, SelectiveLoss
from mmdistill_ext.losses.boxes.box_term import BoxTerm
from mmdistill_ext.units.base import SplitResult, SplitRule, Units
from mmdistill_ext.units.boxes import Boxes, box_ious
from tests.losses.contract import heads
from tests.two_ranks import in_two_ranks

CLASSES, IGNORED = 3, -1
DISTANCES = ('iou', 'l1', 'distribution')
DISTRIBUTIONS = ('student_distribution', 'teacher_distribution')


def draw_boxes(shape, generator, dtype=torch.float32):
    center = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 20 + 40
    size = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 20 + 10
    return torch.cat((center - size / 2, center + size / 2), -1)


def positives(labels):
    """Image and unit of each unit with a class."""
    return ((labels >= 0) & (labels < CLASSES)).nonzero(as_tuple=True)


def every(boxes):
    """All of them selected."""
    return torch.ones(len(boxes.student), dtype=torch.bool)


def some(boxes):
    """Two of three."""
    return torch.arange(len(boxes.student)) % 3 > 0


def make(images=4, units=30, seed=0, dtype=torch.float32):
    """Units of a detector: boxes that overlap, background, ignored ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, units)
    logits = [
        torch.randn(images, CLASSES, units, generator=generator, dtype=dtype) for _ in range(2)
    ]
    labels = torch.randint(IGNORED, CLASSES + 1, shape, generator=generator)
    index = positives(labels)
    count = len(index[0])
    student, teacher, target = (draw_boxes((count,), generator, dtype) for _ in range(3))
    bins = [torch.randn(count, 4, 5, generator=generator, dtype=dtype) for _ in range(2)]
    strides = torch.tensor([8.0, 16.0, 32.0], dtype=dtype).repeat_interleave(units // 3)
    boxes = Boxes(
        index=index,
        student=student.requires_grad_(),
        teacher=teacher,
        target=target,
        scale=strides[index[1]],
        student_distribution=bins[0].requires_grad_(),
        teacher_distribution=bins[1],
    )
    return Units(
        student=logits[0].requires_grad_(),
        teacher=logits[1],
        labels=labels,
        ignore_index=IGNORED,
        sigmoid=True,
        background=True,
        boxes=boxes,
    )


def overlap(a, b, generalised=False):
    """IoU or GIoU of two boxes, as floats."""
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum(area) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - ((hull - union) / hull if generalised else 0)


def giou_loss(a, b):
    """1 - GIoU of boxes (N, 4)."""

    def area(low, high):
        return (high - low).clamp(min=0).prod(-1)

    inner = area(torch.max(a[:, :2], b[:, :2]), torch.min(a[:, 2:], b[:, 2:]))
    hull = area(torch.min(a[:, :2], b[:, :2]), torch.max(a[:, 2:], b[:, 2:]))
    union = area(a[:, :2], a[:, 2:]) + area(b[:, :2], b[:, 2:]) - inner
    return 1 - inner / union + (hull - union) / hull


def distance(boxes, place, kind, temperature=1.0):
    """The distance of one unit, as a float."""
    a, b = (x[place].tolist() for x in (boxes.student, boxes.teacher))
    if kind == 'iou':
        return 1 - overlap(a, b, generalised=True)
    if kind == 'l1':
        return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 4 / boxes.scale[place].item()
    total = 0.0
    for side in range(4):
        q, p = (
            [math.exp(x / temperature) for x in bins[place, side].tolist()]
            for bins in (boxes.student_distribution, boxes.teacher_distribution)
        )
        q, p = ([x / sum(values) for x in values] for values in (q, p))
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total / 4 * temperature**2


def gradients(loss, boxes):
    leaves = (boxes.student, boxes.student_distribution)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize(
    ('kind', 'temperature'),
    [('iou', 1.0), ('l1', 1.0), ('distribution', 1.0), ('distribution', 3.0)],
)
def test_distance_equals_the_formula_box_by_box(kind, temperature):
    boxes = make().boxes
    term = BoxTerm(distance=kind, temperature=temperature)
    found, selected = term(boxes, some(boxes)), some(boxes).tolist()
    expected = [
        distance(boxes, place, kind, temperature) if selected[place] else 0
        for place in range(len(selected))
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (found > 0).tolist() == selected


@pytest.mark.parametrize('kind', DISTANCES)
def test_gradient_is_that_of_the_selected_boxes_alone(kind):
    boxes = make(dtype=torch.float64).boxes
    chosen = some(boxes)
    if kind == 'iou':
        expected = giou_loss(boxes.student[chosen], boxes.teacher[chosen]).sum()
    elif kind == 'l1':
        difference = (boxes.student - boxes.teacher)[chosen].abs().mean(-1)
        expected = (difference / boxes.scale[chosen]).sum()
    else:
        expected = (
            F.kl_div(
                (boxes.student_distribution[chosen] / 2).log_softmax(-1),
                (boxes.teacher_distribution[chosen] / 2).softmax(-1),
                reduction='sum',
            )
            / 4
            * 2**2
        )
    found = BoxTerm(distance=kind, temperature=2.0)(boxes, chosen).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for own, other in zip(gradients(found, boxes), gradients(expected, boxes), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)
        assert (own[~chosen] == 0).all()


@pytest.mark.parametrize('kind', DISTANCES)
def test_identical_boxes_give_zero(kind):
    boxes = make().boxes
    same = replace(
        boxes,
        teacher=boxes.student.detach().clone(),
        teacher_distribution=boxes.student_distribution.detach().clone(),
    )
    loss = BoxTerm(distance=kind)(same, every(same)).sum()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    if kind != 'iou':  # whose gradient at the maximum is one-sided
        assert all(g.abs().max() < 1e-5 for g in gradients(loss, same))


@pytest.mark.parametrize('kind', ['iou', 'l1'])
@pytest.mark.parametrize('size', [(0.0, 0.0), (0.0, 7.0)], ids=['point', 'line'])
def test_identical_boxes_without_area_give_zero_and_no_huge_gradient(kind, size):
    """FCOS clamps distances at 0, so that both models may predict a box without width."""
    boxes = make().boxes
    left_top = boxes.teacher[..., :2]
    empty = torch.cat((left_top, left_top + torch.tensor(size)), -1)
    boxes = replace(boxes, teacher=empty, student=empty.clone().requires_grad_())
    loss = BoxTerm(distance=kind)(boxes, every(boxes)).sum()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert gradients(loss, boxes)[0].abs().max() < 10


@pytest.mark.parametrize('kind', ['iou', 'l1'])
def test_a_teachers_box_without_width_gives_no_huge_gradient(kind):
    boxes = make().boxes
    line = boxes.student.detach().clone()
    line[..., 2] = line[..., 0]
    boxes = replace(boxes, teacher=line)
    loss = BoxTerm(distance=kind)(boxes, every(boxes)).sum()
    assert loss.isfinite()
    assert gradients(loss, boxes)[0].abs().max() < 10


@pytest.mark.parametrize('kind', DISTANCES)
def test_nothing_selected_gives_exactly_zero(kind):
    boxes = make().boxes
    loss = BoxTerm(distance=kind)(boxes, torch.zeros_like(every(boxes))).sum()
    assert loss.item() == 0
    assert loss.requires_grad
    assert all((g == 0).all() for g in gradients(loss, boxes))


@pytest.mark.parametrize('kind', DISTANCES)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('who', ['student', 'teacher', 'target'])
def test_bad_boxes_of_other_units_do_not_spread(kind, bad, who):
    """Those that are not selected, and of IoUs those of other units."""
    boxes = make().boxes
    chosen = some(boxes)
    expected = BoxTerm(distance=kind)(boxes, chosen)
    expected_gradients = gradients(expected.sum(), boxes)
    names = [who, f'{who}_distribution'] if who != 'target' else [who]
    changed = {}
    for name in names:
        values = getattr(boxes, name).detach().clone()
        values[~chosen] = bad
        changed[name] = values.requires_grad_(who == 'student')
    spoilt = replace(boxes, **changed)
    loss = BoxTerm(distance=kind)(spoilt, chosen)
    assert torch.equal(loss, expected)
    for own, other in zip(gradients(loss.sum(), spoilt), expected_gradients, strict=True):
        torch.testing.assert_close(own, other)
        assert (own[~chosen] == 0).all()
    for own, other in zip(box_ious(spoilt), box_ious(boxes), strict=True):
        assert torch.equal(own[chosen], other[chosen])


BAD_BOXES = {
    'nan': [math.nan] * 4,
    'infinite': [-math.inf, -math.inf, math.inf, math.inf],
    'one side': [0.0, 0.0, 30.0, math.inf],
    'area overflows': [-1e25, -1e25, 1e25, 1e25],
}
ABSURD = dict(BAD_BOXES, absurd=[-2e5, -2e5, 2e5, 2e5])


@pytest.mark.parametrize('kind', DISTANCES)
@pytest.mark.parametrize(
    ('who', 'name'),
    [*(('teacher', name) for name in ABSURD), *(('student', name) for name in BAD_BOXES)],
)
def test_a_unit_whose_box_overflows_takes_no_part(kind, who, name):
    boxes = make().boxes
    others, term = some(boxes), BoxTerm(distance=kind)
    values = getattr(boxes, who).detach().clone()
    values[~others] = torch.tensor(ABSURD[name])
    spoilt = replace(boxes, **{who: values.requires_grad_(who == 'student')})
    found, expected = term(spoilt, every(boxes)), term(boxes, others)
    assert torch.equal(found, expected)
    found = gradients(found.sum(), spoilt)
    for own, other in zip(found, gradients(expected.sum(), boxes), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_a_unit_whose_distribution_is_not_finite_takes_no_part(name, bad):
    boxes = make().boxes
    others, term = some(boxes), BoxTerm(distance='distribution')
    values = getattr(boxes, name).detach().clone()
    values[~others, 2, 1] = bad
    found = term(replace(boxes, **{name: values}), every(boxes))
    assert torch.equal(found, term(boxes, others))


@pytest.mark.parametrize('together', [False, True])
@pytest.mark.parametrize('name', ABSURD)
def test_a_teachers_box_that_overflows_never_wins(name, together):
    units = make()
    bad = torch.tensor(ABSURD[name]).expand_as(units.boxes.teacher)
    worst = replace(units.boxes, teacher=units.boxes.target + 1e4)  # overlaps nothing
    spoilt = replace(units.boxes, teacher=bad)
    assert (box_ious(spoilt)[1] == 0).all()
    loss = SelectiveLoss(together=together, average='positive', box=dict(distance='l1'))
    found, expected = (loss(replace(units, boxes=x)) for x in (spoilt, worst))
    assert torch.equal(found['loss'], expected['loss'])
    assert found['loss_box'] == 0


def test_ious_with_the_assigned_boxes():
    boxes = make().boxes
    student, teacher = box_ious(boxes)
    for place, target in enumerate(boxes.target.tolist()):
        for found, own in ((student, boxes.student), (teacher, boxes.teacher)):
            expected = overlap(own[place].tolist(), target)
            assert found[place].item() == pytest.approx(expected, abs=1e-5)
    assert student.shape == teacher.shape == boxes.scale.shape
    assert not student.requires_grad


def test_half_precision_boxes():
    boxes = make().boxes
    half = replace(
        boxes, student=boxes.student.detach().half().requires_grad_(), teacher=boxes.teacher.half()
    )
    for kind in ('iou', 'l1'):
        loss = BoxTerm(distance=kind)(half, every(half)).sum()
        expected = BoxTerm(distance=kind)(boxes, every(boxes)).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
        loss.backward()
        assert half.student.grad.isfinite().all()


def test_gradcheck():
    boxes = make(1, 6, dtype=torch.float64).boxes
    for kind in ('l1', 'distribution'):
        term = BoxTerm(distance=kind, temperature=2.0)
        assert torch.autograd.gradcheck(
            lambda student, bins, term=term: term(
                replace(boxes, student=student, student_distribution=bins), every(boxes)
            ),
            (boxes.student, boxes.student_distribution),
        )


def bce(logits, label):
    """One unit's difference, as a float."""
    total = 0.0
    for c, x in enumerate(logits.tolist()):
        total += max(x, 0) - x * (c == label) + math.log1p(math.exp(-abs(x)))
    return total


def plain(units, selection, joint, kind):
    """Selected classes and boxes unit by unit: their distances and numbers."""
    boxes = units.boxes
    index = torch.stack(boxes.index, 1).tolist()
    places = {tuple(place): i for i, place in enumerate(index)}
    sums = dict(loss=0.0, won=0, valid=0, box=0.0, boxes=0, positive=0)
    for image in range(units.labels.shape[0]):
        for unit in range(units.labels.shape[1]):
            label = units.labels[image, unit].item()
            if label == IGNORED:
                continue
            positive = label < CLASSES
            ious, place = (0, 0), places.get((image, unit))
            assert (place is not None) == positive
            if positive:
                ious = [
                    overlap(b[place].tolist(), boxes.target[place].tolist())
                    for b in (boxes.student, boxes.teacher)
                ]
            own, other = (bce(x[image, :, unit], label) for x in (units.student, units.teacher))
            if joint and positive:
                own, other = own + 1 - ious[0], other + 1 - ious[1]
            wins = other < own or selection == 'all'
            draws = other < own if joint else selection == 'all' or ious[1] > ious[0]
            sums['valid'] += 1
            sums['positive'] += positive
            if wins:
                sums['won'] += 1
                for s, t in zip(
                    units.student[image, :, unit].tolist(),
                    units.teacher[image, :, unit].tolist(),
                    strict=True,
                ):
                    p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
                    sums['loss'] += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            if positive and draws:
                sums['boxes'] += 1
                sums['box'] += distance(boxes, place, kind)
    return sums


@pytest.mark.parametrize('kind', DISTANCES)
@pytest.mark.parametrize('joint', [False, True])
def test_selective_loss_equals_the_plain_reference(joint, kind):
    units = make()
    expected = plain(units, 'teacher_better', joint, kind)
    assert 0 < expected['boxes'] < expected['positive'] < expected['valid']
    for average in ('selected', 'valid', 'positive'):
        loss = SelectiveLoss(average=average, box=dict(distance=kind, weight=0.5), together=joint)
        losses = loss(units, weight=3.0)
        number = expected['won' if average == 'selected' else average]
        assert losses['loss'].item() == pytest.approx(3 * expected['loss'] / number, rel=1e-4)
        box = 3 * 0.5 * expected['box'] / expected['positive']
        assert losses['loss_box'].item() == pytest.approx(box, rel=1e-4)
        share = expected['won'] / expected['valid']
        assert losses['teacher_better'].item() == pytest.approx(share, rel=1e-5)


def test_joint_and_own_selection_differ():
    """Else the test above would compare nothing."""
    own, joint = (plain(make(), 'teacher_better', value, 'iou') for value in (False, True))
    assert own['won'] != joint['won'] or own['loss'] != joint['loss']
    assert own['boxes'] != joint['boxes'] or own['box'] != joint['box']


@pytest.mark.parametrize('kind', DISTANCES)
@pytest.mark.parametrize('average', ['valid', 'positive'])
def test_kd_loss_equals_the_plain_reference(average, kind):
    units = make()
    expected = plain(units, 'all', False, kind)
    losses = KDLoss(average=average, box=dict(distance=kind))(units)
    assert losses['loss'].item() == pytest.approx(expected['loss'] / expected[average], rel=1e-4)
    assert losses['loss_box'].item() == pytest.approx(
        expected['box'] / expected['positive'], rel=1e-4
    )
    assert expected['boxes'] == expected['positive']


def with_labels(units, labels):
    """Other labels; the boxes that are still positive stay."""
    kept = (labels[units.boxes.index] >= 0) & (labels[units.boxes.index] < CLASSES)
    parts = {
        name: getattr(units.boxes, name)[kept].detach()
        for name in ('student', 'teacher', 'target', 'scale', *DISTRIBUTIONS)
    }
    for name in ('student', 'student_distribution'):
        parts[name].requires_grad_()
    index = tuple(x[kept] for x in units.boxes.index)
    return replace(units, labels=labels, boxes=Boxes(index=index, **parts))


def without_positives(units, count=0):
    """The first ``count`` positives of the first image stay."""
    labels = units.labels.clone()
    labels[units.boxes.index] = CLASSES
    places = tuple(x[:count] for x in units.boxes.index)
    labels[places] = units.labels[places]
    return with_labels(units, labels)


@pytest.mark.parametrize('joint', [False, True])
def test_without_positives_the_sum_is_divided_by_one(joint):
    units = without_positives(make())
    expected = plain(units, 'teacher_better', False, 'iou')
    assert expected['positive'] == 0 < expected['won']
    losses = SelectiveLoss(average='positive', box={}, together=joint)(units)
    assert losses['loss'].item() == pytest.approx(expected['loss'], rel=1e-4)
    assert losses['loss_box'].item() == 0
    (losses['loss'] + losses['loss_box']).backward()
    assert units.student.grad.abs().max() > 0
    assert len(units.boxes.student) == 0


def test_one_positive_is_divided_by_one():
    units = without_positives(make(), 1)
    expected = plain(units, 'all', False, 'iou')
    losses = KDLoss(average='positive', box={})(units)
    assert expected['positive'] == 1
    assert losses['loss'].item() == pytest.approx(expected['loss'], rel=1e-4)
    assert losses['loss_box'].item() == pytest.approx(expected['box'], rel=1e-4)


@pytest.mark.parametrize('average', ['selected', 'valid', 'positive'])
def test_all_ignored_gives_exactly_zero(average):
    units = make()
    units = with_labels(units, torch.full_like(units.labels, IGNORED))
    losses = SelectiveLoss(average=average, box={}, together=True)(units)
    assert losses['loss'].item() == losses['loss_box'].item() == 0
    (losses['loss'] + losses['loss_box']).backward()
    assert (units.student.grad == 0).all()
    assert len(units.boxes.student) == 0


def test_softmax_heads_with_background_count_positives():
    units = make()
    wide = [torch.cat((x, torch.zeros(4, 1, 30)), 1) for x in (units.student, units.teacher)]
    units = replace(units, student=wide[0], teacher=wide[1], sigmoid=False, background=False)
    losses = KDLoss(average='positive', box={})(units)
    positive = len(units.boxes.student)
    valid = units.labels != IGNORED
    p, q = wide[1].log_softmax(1), wide[0].log_softmax(1)
    expected = ((p.exp() * (p - q)).sum(1) * valid).sum() / positive
    torch.testing.assert_close(losses['loss'], expected, rtol=1e-4, atol=0)
    box = sum(distance(units.boxes, place, 'iou') for place in range(positive))
    assert losses['loss_box'].item() == pytest.approx(box / positive, rel=1e-4)


def test_contrast_is_kept_with_joint_selection_only_on_demand():
    loss, units = SelectiveLoss(box={}, together=True), make()
    loss(units)
    assert loss.records.pop_contrast() is None
    loss.records.keep_contrast = True
    loss(units)
    assert (
        loss.records.pop_contrast().wins.sum().item()
        == plain(units, 'teacher_better', True, 'iou')['won']
    )


def test_counts_have_a_column_of_background():
    loss, units = SelectiveLoss(box={}), make()
    loss(units)
    counts = loss.records.pop_counts()
    valid = units.labels[units.labels != IGNORED]
    assert counts[0].tolist() == valid.bincount(minlength=CLASSES + 1).tolist()


def split_up(units, weight=0.3):
    """Some units are simple, and the head's own loss is split already."""
    shape = units.labels.shape
    simple = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    own = SplitResult(torch.tensor([5, 7]), torch.tensor([2.0, 3.0]), len(units.labels))
    split = SplitRule('unit', threshold=0.9, hard_weight=weight)
    return replace(units, split=split, simple=simple, own=own)


@pytest.mark.parametrize('weight', [0, 0.3, 1])
@pytest.mark.parametrize('kind', DISTANCES)
@pytest.mark.parametrize('joint', [None, False, True])
def test_classes_and_boxes_are_split_alike(joint, kind, weight):
    """The parts hold classes, boxes and what the head itself lost."""

    def build():
        box = dict(distance=kind, weight=0.5)
        if joint is None:
            return KDLoss(average='positive', box=box)
        return SelectiveLoss(average='positive', box=box, together=joint)

    plain, units = build()(make(), 2.0), split_up(make(), weight)
    loss = build()
    found = loss(units, 2.0)
    assert found.keys() - plain.keys() == {'l_soft', 'l_hard'}
    alone = []
    for simple in (units.simple, ~units.simple):  # the sums of either kind, the others left out
        part = build()(replace(split_up(make(), 0), simple=simple), 2.0)
        alone.append((part['loss'] + part['loss_box']).detach())
    torch.testing.assert_close(sum(alone), (plain['loss'] + plain['loss_box']).detach())
    torch.testing.assert_close(found['l_soft'], alone[0] + 2)
    torch.testing.assert_close(found['l_hard'], alone[1] + 3)
    total = (found['loss'] + found['loss_box']).detach()
    torch.testing.assert_close(total, alone[0] + weight * alone[1])
    assert min(alone) > 0
    assert loss.records.pop_fit_sums().tolist() == [5 * 4, 4, 5, 7]
    assert loss.records.pop_fit_sums() is None


def test_only_the_term_that_leads_counts_the_heads_own_loss():
    found = KDLoss(box={})(replace(split_up(make()), own=None))
    expected = KDLoss(box={})(split_up(make()))
    torch.testing.assert_close(found['l_soft'] + 2, expected['l_soft'])
    torch.testing.assert_close(found['l_hard'] + 3, expected['l_hard'])


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_hard_boxes_of_weight_0_may_be_anything(bad):
    expected = split_up(make(), 0)
    hard = ~expected.simple[expected.boxes.index]
    units = split_up(make(), 0)
    teacher = units.boxes.teacher.clone()
    teacher[hard] = bad
    units = replace(units, boxes=replace(units.boxes, teacher=teacher))
    runs = [KDLoss(box=dict(distance='l1'))(x) for x in (units, expected)]
    assert torch.equal(runs[0]['loss_box'], runs[1]['loss_box'])
    gradients = [
        torch.autograd.grad(run['loss_box'], x.boxes.student)[0]
        for run, x in zip(runs, (units, expected), strict=True)
    ]
    assert torch.equal(gradients[0][~hard], gradients[1][~hard])


LOSSES = {
    'own': lambda: SelectiveLoss(average='positive', box={}),
    'joint': lambda: SelectiveLoss(box=dict(distance='l1'), together=True),
    'kd': lambda: KDLoss(average='positive', box=dict(distance='distribution', temperature=2.0)),
    'valid': lambda: KDLoss(average='valid', box=dict(weight=2.0)),
}
UNITS = {
    'many': make,
    'one': lambda: without_positives(make(), 1),
    'none': lambda: without_positives(make()),
}


def half(units, rank):
    """One rank's images, with leaves of their own."""
    part = slice(2 * rank, 2 * rank + 2)
    here = units.boxes.index[0] // 2 == rank

    def cut(x, part):
        return x.detach()[part].clone().requires_grad_(x.requires_grad)

    def cut_all(data, names, part):
        return {name: cut(getattr(data, name), part) for name in names}

    images, places = (x[here] for x in units.boxes.index)
    tensors = ['student', 'teacher', 'target', 'scale', *DISTRIBUTIONS]
    boxes = Boxes(index=(images - 2 * rank, places), **cut_all(units.boxes, tensors, here))
    return replace(units, boxes=boxes, **cut_all(units, ['student', 'teacher', 'labels'], part))


def outcome(loss, units):
    """Losses and gradients of one rank."""
    losses = loss(units)
    (losses['loss'] + losses['loss_box']).backward()
    leaves = units.student, units.boxes.student, units.boxes.student_distribution
    return (
        losses['loss'].detach(),
        losses['loss_box'].detach(),
        *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves),
    )


def worker(rank):
    found = {
        f'{name} {which}': outcome(build(), half(units(), rank))
        for name, build in LOSSES.items()
        for which, units in UNITS.items()
    }
    loss = KDLoss(average='positive', box={})
    loss(split_up(half(make(), rank)))
    found['fit'] = loss.records.pop_fit_sums()
    return found


def test_two_ranks_give_the_gradient_of_one():
    """Also where all positives, or the only one, are with the first rank."""
    first, second = in_two_ranks(worker)
    for name, build in LOSSES.items():
        for which, units in UNITS.items():
            whole = outcome(build(), units())
            a, b = first[f'{name} {which}'], second[f'{name} {which}']
            for place in range(2):
                torch.testing.assert_close(
                    (a[place] + b[place]) / 2, whole[place], rtol=1e-4, atol=1e-7
                )
            for place in range(2, 5):
                torch.testing.assert_close(
                    torch.cat((a[place], b[place])) / 2, whole[place], rtol=1e-4, atol=1e-7
                )
    assert whole[1] == 0 < whole[0]
    assert first['fit'].tolist() == second['fit'].tolist() == [2 * 5 * 2, 4, 2 * 5, 2 * 7]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(weight=-1.0), 'box.weight=-1.0'),
        (dict(weight=math.inf), 'box.weight=inf'),
        (dict(distance='giou'), "iou, l1, distribution.*box.distance='giou'"),
        (dict(distance='distribution', temperature=0), 'temperature=0'),
    ],
)
@pytest.mark.parametrize('loss', [SelectiveLoss, KDLoss])
def test_bad_arguments_are_named(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(box=arguments)


def test_joint_needs_boxes():
    with pytest.raises(ValueError, match='`together=True` needs a `box`'):
        SelectiveLoss(together=True)


def test_check_compares_with_the_heads():
    detector = heads(3, sigmoid=True, background=True, box_distances=('iou', 'l1'))
    SelectiveLoss(box=dict(distance='l1'), average='positive').check(detector)
    SelectiveLoss(class_weight=[1.0] * 4).check(detector)
    with pytest.raises(ValueError, match="one of iou, l1 .*Found 'distribution'"):
        KDLoss(box=dict(distance='distribution')).check(detector)
    with pytest.raises(ValueError, match="leave it out. Found 'iou'"):
        KDLoss(box={}).check(heads(3))
    with pytest.raises(ValueError, match="'positive'.*without boxes"):
        KDLoss(average='positive').check(heads(3))
    with pytest.raises(ValueError, match='hold 4 weights.*Found 3'):
        KDLoss(class_weight=[1.0] * 3).check(detector)
