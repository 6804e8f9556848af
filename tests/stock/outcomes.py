"""What distillation does with a stock detector: it trains, or is refused at start by its key."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.units.pairing import pair_heads
from tests.stock import detectors
from tests.stock.detectors import STOCK, Stock

KD = dict(type='KDLoss', temperature=2.0)
SEL = dict(type='SelectiveLoss', temperature=2.0)
BOX = dict(weight=1.0, distance='l1')  # an untrained CenterNet's boxes have no area
FEATURES = dict(
    cwd=dict(type='CWDLoss', tap='backbone', connector=dict(type='Conv1x1'), temperature=4.0)
)
FIT = dict(function=dict(type='ConstantFit', c=0.5), split='unit')
HEADS = ('bbox_head', 'roi_head.bbox_head', 'panoptic_head', 'mask_head')
MASK_HEADS = (
    'roi_head.mask_head',
    'mask_head',
    'bbox_head.mask_head',
    'panoptic_head.mask_embed',
)
REFUSED = ('`losses', '`student', '`fit', '`teacher')
"""How the message of a refusal begins or what it names: a config key."""


def distil(stock: Stock, losses: dict, **options: object) -> nn.Module:
    """The student of a stock config, with a teacher of twice its backbone's width."""
    torch.manual_seed(0)
    model = build_teacher_student(
        detectors.config(stock), detectors.teacher(stock), losses, **options
    )
    detectors.set_what_is_left(model, stock)
    return model


def outcome_of(run: Callable[[], None]) -> str:
    """Run it: ``'yes'``, or what it was refused with at start.

    Raises:
        Exception: Whatever is no refusal by a config key.
    """
    try:
        run()
    except ValueError as error:
        if any(key in str(error) for key in REFUSED):
            return ' '.join(str(error).split())
        raise
    return 'yes'


def train(model: nn.Module, stock: Stock, terms: tuple[str, ...]) -> dict[str, Tensor]:
    """One step; every named term is finite and reaches the student.

    Args:
        model: A distilled model.
        stock: Its config.
        terms: What the names of the terms' losses end with.
    """
    losses = detectors.losses_of(model, stock)
    for term in terms:
        (name,) = [name for name in losses if name.endswith(f'loss_{term}')]
        assert losses[name].isfinite(), name
        assert losses[name].requires_grad, name
        assert losses[name] > 0, f'{name} is 0 although the models differ'
    model.parse_losses(losses)[0].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    return losses


def classes(stock: Stock) -> str:
    """The default head's classes by KD and SEL."""
    losses = dict(kd=dict(**KD), sel=dict(**SEL))

    def run() -> None:
        # An untrained teacher may win nowhere, so SEL may be 0.
        train(distil(stock, losses), stock, ('kd',))

    return outcome_of(run)


def boxes(stock: Stock) -> str:
    """Boxes of the default head by KD."""
    losses = dict(kd=dict(**KD, box=BOX))

    def run() -> None:
        train(distil(stock, losses), stock, ('kd', 'kd_box'))

    return outcome_of(run)


def masks(stock: Stock) -> str:
    """Mask pixels by KD, of the first mask head that there is; empty without one."""
    head = mask_head_of(detectors.build(stock))
    if head is None:
        return ''

    def run() -> None:
        train(distil(stock, dict(kd=dict(**KD, head=head))), stock, ('kd',))

    return outcome_of(run)


def mask_head_of(model: nn.Module) -> str | None:
    """Path of the head that masks are distilled by."""
    if getattr(model, 'bbox_head', None) is None and hasattr(model, 'mask_head'):
        return 'mask_head.loss_mask'  # of SOLO, whose mask head predicts the classes too
    for head in MASK_HEADS:
        try:
            model.get_submodule(head)
        except AttributeError:
            continue
        return head
    return None


def fit(stock: Stock) -> str:
    """FIT by unit on the default head."""

    def run() -> None:
        train(distil(stock, dict(kd=dict(**KD)), fit=FIT), stock, ('kd',))

    return outcome_of(run)


def features(stock: Stock) -> str:
    """A loss of the backbone's maps, with a connector."""

    def run() -> None:
        train(distil(stock, FEATURES), stock, ('cwd',))

    return outcome_of(run)


def together(stock: Stock) -> str:
    """Two networks that learn together."""

    def run() -> None:
        torch.manual_seed(0)
        students = dict(a=detectors.config(stock), b=detectors.config(stock, 2))
        model = CollaborativeDistiller(students, second=dict(type='MinLoss'))
        detectors.set_what_is_left(model, stock)
        losses = detectors.losses_of(model, stock)
        model.parse_losses(losses)[0].backward()
        assert any(name.startswith('a/loss_kl') for name in losses), sorted(losses)

    return outcome_of(run)


COLUMNS = dict(
    classes=classes, boxes=boxes, masks=masks, fit=fit, features=features, together=together
)


def row(stock: Stock) -> dict[str, str]:
    """What a stock config does: ``'yes'``, ``''`` for what it does not have, or why not."""
    outcome = dict(config=stock.config, head=head_of(detectors.build(stock)))
    for name, run in COLUMNS.items():
        depends = name in ('boxes', 'fit') and outcome['classes'] != 'yes'
        outcome[name] = '' if depends else run(stock)
    return outcome


def check(stock: Stock, said: dict[str, str]) -> None:
    """Assert that a config does what was said of it, in fewer runs than :func:`row`.

    What works is run in one model, but for FIT beside masks; what does not is refused with the
    same words. Networks that learn together are left to the page, and to tests of their own.
    """
    losses, terms = {}, []
    if said['classes'] == 'yes':
        box = dict(box=BOX) if said['boxes'] == 'yes' else {}
        losses.update(kd=dict(**KD, **box), sel=dict(**SEL))
        terms += ['kd', *(['kd_box'] if box else [])]
    if said['masks'] == 'yes':
        losses['pixels'] = dict(**KD, head=mask_head_of(detectors.build(stock)))
        terms.append('pixels')
    if said['features'] == 'yes':
        losses.update(FEATURES)
        terms.append('cwd')
    fitted = said['fit'] == 'yes' and not said['masks']  # not every mask's loss can be split
    train(distil(stock, losses, fit=FIT if fitted else None), stock, tuple(terms))
    done = {name for name in COLUMNS if said[name] in ('', 'yes')}
    for name in COLUMNS.keys() - (done if fitted else done - {'fit'}):
        if said[name]:
            assert COLUMNS[name](stock) == said[name]


def head_of(model: nn.Module) -> str:
    """Class of the head that a detector predicts with."""
    for path in HEADS:
        try:
            head = model.get_submodule(path)
        except AttributeError:
            continue
        return type(head[-1] if isinstance(head, nn.ModuleList) else head).__name__
    raise AssertionError(f'no head in {type(model).__name__}')


def rows() -> list[dict[str, str]]:
    """The table of detectors, with the heads that each can learn from."""
    models = [detectors.build(stock) for stock in STOCK]
    for model in models:  # their structure is all that pairing looks at
        for parameter in model.parameters():
            parameter.data = parameter.data.new_empty(0)
    teachers = [teachers_of(model, models) for model in models]
    del models
    with get_context('spawn').Pool() as pool:  # a process per core
        done = pool.map(row, STOCK, chunksize=1)
    return [row | {'learns from': names} for row, names in zip(done, teachers, strict=True)]


def teachers_of(student: nn.Module, models: list[nn.Module]) -> str:
    """Heads of the models that a student can learn from."""
    fitting = {}
    for model in models:
        if (
            outcome_of(lambda model=model: pair_heads(student, model, None, None, 'losses.kd'))
            == 'yes'
        ):
            fitting[head_of(model)] = None
    return ', '.join(fitting)
