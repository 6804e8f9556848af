import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import error_correlation, min_loss, mix
from mmdistill_ext.losses.boxes.joint_box_term import JointBoxTerm
from mmdistill_ext.losses.collaboration_loss import ENSEMBLE, CollaborationLoss
from mmdistill_ext.policies.second_predictions import General, LabelSpec, MinLoss
from mmdistill_ext.units.joint import JointBoxes, JointUnits

PIXELS = LabelSpec('ce', 255, False)
ANCHORS = LabelSpec('bce', -1, True)
WEIGHTS = torch.tensor([0.75, 0.5, -0.25], dtype=torch.float64)
NAMES = ('a', 'b', 'c')


def pixels():
    torch.manual_seed(0)
    logits = tuple(torch.randn(2, 4, 6, 5, dtype=torch.float64).requires_grad_() for _ in NAMES)
    labels = torch.randint(0, 4, (2, 6, 5))
    labels[:, 0] = 255
    return JointUnits(logits, labels, (False,) * 3)


def boxes(count):
    corners = torch.rand(4, count, 2) * 20
    made = torch.cat([corners, corners + 5 + torch.rand(4, count, 2) * 20], 2)
    *networks, target = made.unbind()
    return JointBoxes(
        tuple(x.requires_grad_() for x in networks), target, torch.full((count,), 8.0)
    )


def anchors(positives=3):
    torch.manual_seed(0)
    logits = tuple(torch.randn(2, 1, 3, 8).requires_grad_() for _ in NAMES)
    labels = torch.full((2, 8), 3)
    labels[0, :positives] = torch.arange(positives) % 3
    labels[1, :2] = -1
    return JointUnits(tuple((x,) for x in logits), labels, (False,) * 3, boxes(positives))


def make(policy=None, spec=PIXELS, **options):
    options = dict(is_detection=spec is ANCHORS, num_classes=3 if spec is ANCHORS else 4) | options
    return CollaborationLoss(NAMES, (policy or MinLoss()).bind(spec), **options)


@pytest.mark.parametrize('policy', [MinLoss(), General()], ids=repr)
def test_pixels_by_the_formula(policy):
    units = pixels()
    losses = make(policy, second_weight=0.5, temperature=2.0)(units, 0.25, WEIGHTS)
    logits, valid = torch.stack(units.logits), units.labels != 255
    mixture = mix(logits, WEIGHTS) if policy == General() else min_loss(logits, units.labels)
    expected = {f'{ENSEMBLE}/loss': 0.5 * F.cross_entropy(mixture, units.labels, ignore_index=255)}
    teacher = (mixture.detach() / 2).softmax(1)
    for name, own in zip(NAMES, units.logits, strict=True):
        pull = (teacher * (teacher.log() - (own / 2).log_softmax(1))).sum(1)
        expected[f'{name}/loss_kl'] = 0.25 * 4 * pull[valid].mean()
    assert list(losses) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)


def test_anchors_are_averaged_over_the_positive_ones():
    units = anchors(3)
    losses = make(spec=ANCHORS)(units, 1.0, WEIGHTS)
    logits = torch.stack([x[0][:, 0] for x in units.logits])
    mixture = min_loss(logits, units.labels, **ANCHORS._asdict())
    target = F.one_hot(units.labels.clamp(min=0), 4)[..., :3].movedim(-1, 1).float()
    each = F.binary_cross_entropy_with_logits(mixture, target, reduction='none').sum(1)
    torch.testing.assert_close(losses[f'{ENSEMBLE}/loss'], each[units.labels >= 0].sum() / 3)


@pytest.mark.parametrize('count', [3, 5])
def test_boxes_are_averaged_over_the_boxes(count):
    """A head may train more boxes than units with a class."""
    units = dataclasses.replace(anchors(3), boxes=boxes(count))
    term = JointBoxTerm(weight=0.5)
    losses = make(spec=ANCHORS, box=term, second_weight=0.25)(units, 2.0, WEIGHTS)
    second, pulls = term(units.boxes, None)
    torch.testing.assert_close(losses[f'{ENSEMBLE}/loss_box'], 0.25 * 0.5 * second / count)
    for name, pull in zip(NAMES, pulls, strict=True):
        torch.testing.assert_close(losses[f'{name}/loss_kl_box'], 2.0 * 0.5 * pull / count)
    weighted = make(General(), ANCHORS, box=term)(units, 1.0, WEIGHTS)
    second, _ = term(units.boxes, WEIGHTS)
    torch.testing.assert_close(weighted[f'{ENSEMBLE}/loss_box'], 0.5 * second / count)


@pytest.mark.parametrize(
    ('second_weight', 'weight', 'expected'),
    [
        (1.0, 0.0, ['ensemble/loss', 'ensemble/loss_box']),
        (0.0, 1.0, [f'{n}/loss_kl{suffix}' for suffix in ('', '_box') for n in NAMES]),
    ],
)
def test_a_part_without_a_factor_is_left_out(second_weight, weight, expected):
    loss = make(spec=ANCHORS, box=JointBoxTerm(), second_weight=second_weight)
    assert list(loss(anchors(), weight, WEIGHTS)) == expected


@pytest.mark.parametrize('weights', [None, WEIGHTS], ids=['best', 'mean'])
@pytest.mark.parametrize('distance', ['iou', 'l1'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e25])
def test_a_box_that_overflows_spoils_no_other(weights, distance, bad):
    """The networks' own boxes are pulled where the second box is one."""
    boxes, term = anchors(3).boxes, JointBoxTerm(distance=distance)
    networks = [x.detach().clone() for x in boxes.networks]
    networks[0][0] = bad
    networks = tuple(x.requires_grad_() for x in networks)
    second, pulls = term(dataclasses.replace(boxes, networks=networks), weights)
    (second + sum(pulls)).backward()
    assert second.isfinite()
    assert all(pull.isfinite() for pull in pulls)
    assert all(x.grad.isfinite().all() for x in networks)
    assert not networks[0].grad[0].any()
    assert all(x.grad[1:].any() for x in networks)


def test_without_anything_to_learn_from_it_is_0():
    units = pixels()
    units.labels.fill_(255)
    losses = make()(units, 1.0, WEIGHTS)
    assert {value.item() for value in losses.values()} == {0.0}
    sum(losses.values()).backward()
    assert not any(x.grad.any() for x in units.logits)
    units = anchors(0)
    losses = make(spec=ANCHORS, box=JointBoxTerm())(units, 1.0, WEIGHTS)
    assert losses['ensemble/loss'] > 0  # all is background
    assert losses['ensemble/loss_box'] == losses['a/loss_kl_box'] == 0


def test_it_has_no_state():
    """The networks' weights are the distiller's: their key in checkpoints is `weights`."""
    assert not make(General()).state_dict()
    assert not list(make(spec=ANCHORS, box=JointBoxTerm()).parameters())


def test_errors_correlate_as_those_of_the_function():
    units = pixels()
    expected, _ = error_correlation(torch.stack(units.logits), units.labels)
    torch.testing.assert_close(make().error_correlation(units), expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0.0), '`kl.temperature` should be a finite number > 0'),
        (dict(second_weight=-1.0), '`second_weight` should be a finite number >= 0'),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
