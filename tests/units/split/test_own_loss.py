"""What each kind of loss module of mmdet gives, row by row, and how it is weighed."""

import pytest
import torch
from mmdet.models import losses as L
from torch import nn

from mmdistill_ext.units.split.own_loss import OwnLoss, check_loss_modules, total_loss

N, C = 12, 4


class Head(nn.Module):
    """What is at the end of a head: a module, and a number to divide by."""

    def __init__(self, loss, divisor=1.0):
        super().__init__()
        self.loss_x = loss
        self.divisor = divisor

    def forward(self, pred, target, **kwargs):
        return dict(loss_x=self.loss_x(pred, target, **kwargs) / self.divisor)


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def draw_boxes(seed):
    corners = torch.rand(N, 2, generator=torch.Generator().manual_seed(seed)) * 10
    return torch.cat((corners, corners + 5 + draw(N, 2) * 10), 1)


LABELS = torch.arange(N) % (C + 1)  # C is background
SCORES = dict(pred=draw(N, C) * 4 - 2, weight=(draw(N) > 0.2).float(), avg_factor=7.0)
CLASSES = {**SCORES, 'target': LABELS}
BOXES = dict(pred=draw_boxes(1), target=draw_boxes(2), avg_factor=7.0)
PER_BOX, PER_SIDE = (dict(BOXES, weight=draw(*shape)) for shape in ((N,), (N, 4)))
WIDE = dict(CLASSES, pred=draw(N, C + 1) * 4 - 2)
CASES = {
    'focal': (lambda: L.FocalLoss(loss_weight=0.5), CLASSES),
    'quality': (lambda: L.QualityFocalLoss(), {**SCORES, 'target': (LABELS, draw(N))}),
    'softmax': (lambda: L.CrossEntropyLoss(loss_weight=0.5), WIDE),
    'softmax_weighed': (lambda: L.CrossEntropyLoss(class_weight=[1.0, 2.0, 0.5, 0, 0.1]), WIDE),
    'sigmoid': (lambda: L.CrossEntropyLoss(use_sigmoid=True), CLASSES),
    'sigmoid_soft': (
        lambda: L.CrossEntropyLoss(use_sigmoid=True, reduction='sum'),
        dict(pred=SCORES['pred'], target=draw(N, C)),
    ),
    'l1': (lambda: L.L1Loss(loss_weight=2.0), PER_SIDE),
    'smooth_l1': (lambda: L.SmoothL1Loss(beta=0.5), PER_SIDE),
    'iou': (lambda: L.IoULoss(mode='square'), PER_BOX),
    'iou_sum': (
        lambda: L.IoULoss(mode='square', reduction='sum'),
        {key: BOXES[key] for key in ('pred', 'target')},
    ),
    'giou': (lambda: L.GIoULoss(loss_weight=2.0), PER_BOX),
    'giou_of_sides': (lambda: L.GIoULoss(), PER_SIDE),
    'diou': (lambda: L.DIoULoss(), PER_BOX),
    'ciou': (lambda: L.CIoULoss(), PER_BOX),
    'dfl': (
        lambda: L.DistributionFocalLoss(loss_weight=0.25),
        dict(pred=draw(N, 8) * 4, target=draw(N) * 6.9, weight=draw(N), avg_factor=4.0),
    ),
    'mask': (
        lambda: L.CrossEntropyLoss(use_mask=True, loss_weight=0.5),
        dict(pred=draw(N, C, 3, 3) * 4 - 2, target=(draw(N, 3, 3) > 0.5).float()),
    ),
}
SIMPLE = torch.arange(N) % 3 > 0
MASKS = {
    'mixed': SIMPLE,
    'all_simple': torch.ones_like(SIMPLE),
    'all_hard': torch.zeros_like(SIMPLE),
}


def arguments(case):
    """What the head gives its module, with a leaf of its own."""
    kwargs = dict(CASES[case][1])
    kwargs['pred'] = kwargs['pred'].clone().requires_grad_()
    if case == 'mask':
        kwargs['weight'] = LABELS % C  # the third argument, by whatever name
    return kwargs


def call(head, kwargs):
    """As heads do it: prediction and target by place, mask heads the classes too."""
    kwargs = dict(kwargs)
    places = [kwargs.pop(key) for key in ('pred', 'target')]
    return head(*places, **kwargs)


def run(case, weight, mask, divisor=1.0):
    """Loss, gradient and parts of a head."""
    head, kwargs = Head(CASES[case][0](), divisor), arguments(case)
    own = OwnLoss(head, weight)
    own.row_mask = {'loss_x': mask}.get
    with own():
        losses = call(head, kwargs)
    parts = own.parts(losses)
    (gradient,) = torch.autograd.grad(losses['loss_x'].sum(), kwargs['pred'])
    return losses['loss_x'], gradient, parts


def by_hand(case, weight, mask, divisor=1.0):
    """The rows of either kind in a call of their own, weighed and divided afterwards."""
    module, kwargs = CASES[case][0](), arguments(case)
    factor = kwargs.pop('avg_factor', None)
    sums = []
    for part in (mask, ~mask):
        rows = {
            key: tuple(x[part] for x in value) if isinstance(value, tuple) else value[part]
            for key, value in kwargs.items()
        }
        if not part.any():
            sums.append(torch.zeros(()))
        elif case == 'mask':  # it gives nothing but the mean
            sums.append(module(*rows.values()).sum() * part.sum() / N)
        else:
            places = rows.pop('pred'), rows.pop('target')
            sums.append(module(*places, **rows, reduction_override='sum'))
    parts = torch.stack(sums) / ((factor or 1) * divisor)
    total = parts[0] + weight * parts[1]
    (gradient,) = torch.autograd.grad(total, kwargs['pred'])
    return total, gradient, parts.detach()


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('case', CASES)
def test_a_weight_of_1_is_the_module_itself_to_the_bit(case, mask):
    head, kwargs = Head(CASES[case][0](), 3.0), arguments(case)
    expected = call(head, kwargs)['loss_x']
    (gradient,) = torch.autograd.grad(expected.sum(), kwargs['pred'])
    found = run(case, 1, MASKS[mask], 3.0)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], gradient)
    torch.testing.assert_close(found[2], by_hand(case, 1, MASKS[mask], 3.0)[2])
    assert found[2].sum() > 0


@pytest.mark.parametrize('weight', [0, 0.3, 2.0])
@pytest.mark.parametrize('case', CASES)
def test_other_weights_weigh_the_hard_rows(case, weight):
    total, gradient, parts = run(case, weight, SIMPLE, 3.0)
    expected = by_hand(case, weight, SIMPLE, 3.0)
    torch.testing.assert_close(total.sum(), expected[0])
    torch.testing.assert_close(gradient, expected[1])
    torch.testing.assert_close(parts, expected[2])
    assert parts.min() > 0
    assert not parts.requires_grad


@pytest.mark.parametrize('weight', [0.3, 1])
def test_without_a_divisor_it_is_the_mean(weight):
    kwargs = arguments('l1')
    head = Head(L.L1Loss())
    own = OwnLoss(head, weight)
    own.row_mask = lambda name: SIMPLE
    with own():
        found = head(kwargs['pred'], kwargs['target'])
    units = (kwargs['pred'] - kwargs['target']).abs()
    factor = torch.where(SIMPLE, 1.0, weight)[:, None]
    torch.testing.assert_close(found['loss_x'], (units * factor).mean())
    expected = torch.stack([units[part].sum() for part in (SIMPLE, ~SIMPLE)]) / units.numel()
    torch.testing.assert_close(own.parts(found), expected.detach())


def test_several_rows_belong_to_a_unit():
    """The four sides of a box."""
    whole = run('dfl', 0.3, SIMPLE[:3].repeat_interleave(4))
    found = run('dfl', 0.3, SIMPLE[:3])
    for own, other in zip(found, whole, strict=True):
        assert torch.equal(own, other)


def test_calls_add_up_and_belong_to_losses_by_their_names():
    """Levels of one head, and losses that carry a prefix."""
    head, kwargs = Head(L.L1Loss()), arguments('l1')
    head.loss_y = L.GIoULoss()
    own = OwnLoss(head, 0.3)
    own.row_mask = lambda name: SIMPLE if name == 'loss_x' else ~SIMPLE
    pred, target = kwargs['pred'], kwargs['target']
    with own():
        levels = [head.loss_x(pred, target) / 5, head.loss_x(2 * pred, target) / 5]
        other = head.loss_y(pred, target, avg_factor=4.0)
    found = own.parts({'d0.loss_x': levels, 'd0.loss_y': other, 'loss_z': torch.ones(())})
    units = ((pred - target).abs() + (2 * pred - target).abs()) / target.numel() / 5
    boxes = L.GIoULoss(reduction='none')(pred, target) / 4
    expected = [
        units[SIMPLE].sum() + boxes[~SIMPLE].sum(),
        units[~SIMPLE].sum() + boxes[SIMPLE].sum(),
    ]
    torch.testing.assert_close(found, torch.stack(expected).detach())


def test_a_call_without_rows_is_left_alone():
    head, kwargs = Head(L.L1Loss()), arguments('l1')
    own = OwnLoss(head, 0.0)
    own.row_mask = lambda name: None
    with own():
        losses = call(head, kwargs)
    assert torch.equal(losses['loss_x'], call(head, kwargs)['loss_x'])
    assert own.parts(losses).tolist() == [0, 0]


@pytest.mark.parametrize('weight', [0, 0.3, 1])
@pytest.mark.parametrize('kind', [L.L1Loss, L.SmoothL1Loss, L.GIoULoss])
def test_no_rows_at_all_give_0(kind, weight):
    """And gradients of 0 where the module itself has them."""
    pred = torch.zeros(0, 4, requires_grad=True)
    for extra in ({}, dict(weight=torch.zeros(0, 4))):
        head = Head(kind())
        own = OwnLoss(head, weight)
        own.row_mask = lambda name: SIMPLE[:0]
        with own():
            losses = head(pred, torch.zeros(0, 4), avg_factor=1.0, **extra)
        assert losses['loss_x'].item() == 0
        assert own.parts(losses).tolist() == [0, 0]
        plain = head(pred, torch.zeros(0, 4), avg_factor=1.0, **extra)
        assert losses['loss_x'].requires_grad == plain['loss_x'].requires_grad


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_hard_rows_of_weight_0_may_hold_anything(bad):
    expected = run('l1', 0, SIMPLE)
    head, kwargs = Head(L.L1Loss(loss_weight=2.0)), arguments('l1')
    kwargs['target'] = kwargs['target'].masked_fill(~SIMPLE[:, None], bad)
    own = OwnLoss(head, 0)
    own.row_mask = lambda name: SIMPLE
    with own():
        losses = call(head, kwargs)
    parts = own.parts(losses)
    losses['loss_x'].backward()
    assert torch.equal(losses['loss_x'], expected[0])
    assert torch.equal(kwargs['pred'].grad[SIMPLE], expected[1][SIMPLE])
    assert parts[0] == expected[2][0]


def test_nothing_is_left_on_the_modules():
    head, kwargs = Head(L.L1Loss()), arguments('l1')
    before = set(vars(head.loss_x))
    own = OwnLoss(head, 0.3)
    own.row_mask = lambda name: SIMPLE
    with pytest.raises(ZeroDivisionError), own():
        call(head, kwargs)
        raise ZeroDivisionError
    assert set(vars(head.loss_x)) == before


def test_under_autocast_sums_stay_near():
    expected = run('focal', 0.3, SIMPLE)
    with torch.autocast('cpu', torch.bfloat16):
        found = run('focal', 0.3, SIMPLE)
    torch.testing.assert_close(found[0].float(), expected[0], rtol=0.02, atol=0)
    torch.testing.assert_close(found[2].float(), expected[2], rtol=0.02, atol=0)


def test_sums_are_those_that_mmengine_adds_up():
    losses = dict(a=[torch.ones(2), torch.tensor(3.0)], b=torch.tensor([1.0, 2.0]))
    assert total_loss(losses).item() == 1 + 3 + 1.5


@pytest.mark.parametrize('case', CASES)
def test_heads_with_these_modules_are_taken(case):
    check_loss_modules(Head(CASES[case][0]()), 'fit')


REFUSED = {
    'seesaw': lambda: L.SeesawLoss(num_classes=C),
    'ghm': lambda: L.GHMC(),
    'weighed_mask': lambda: L.CrossEntropyLoss(use_mask=True, class_weight=[1.0] * C),
}


@pytest.mark.parametrize('name', REFUSED)
def test_modules_that_give_no_loss_per_row_are_refused(name):
    head = Head(REFUSED[name]())
    kind = type(head.loss_x).__name__
    with pytest.raises(ValueError, match=f'`fit` needs.*one loss per unit.*{kind} in `loss_x` of'):
        check_loss_modules(head, 'fit')


def test_heads_without_modules_are_refused():
    with pytest.raises(ValueError, match='`fit` needs a head with loss modules. Found Linear'):
        check_loss_modules(nn.Linear(1, 1), 'fit')
