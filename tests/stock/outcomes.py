"""What distillation does with a stock detector: it trains, or is refused at start by its key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from tests.stock import detectors
from tests.stock.detectors import Stock

KD = dict(type='KDLoss', temperature=2.0)
SEL = dict(type='SelectiveLoss', temperature=2.0)
FEATURES = dict(
    cwd=dict(type='CWDLoss', tap='backbone', connector=dict(type='Conv1x1'), temperature=4.0)
)
FIT = dict(function=dict(type='ConstantFit', c=0.5), split='unit')
MASK_HEADS = (
    'roi_head.mask_head',
    'mask_head',
    'bbox_head.mask_head',
    'panoptic_head.mask_embed',
)
REFUSED = ('`losses', '`student', '`fit', '`teacher')
"""How the message of a refusal begins or what it names: a config key."""


def distil(stock: Stock, folder: Path, losses: dict, **options: object) -> nn.Module:
    """The student of a stock config, with a teacher of twice its backbone's width."""
    torch.manual_seed(0)
    model = build_teacher_student(
        detectors.config(stock), detectors.save_teacher(stock, folder), losses, **options
    )
    model.init_weights()
    return model


def refusal(run: Callable[[], None]) -> str:
    """Run it; what it was refused with at start, empty if it trained.

    Raises:
        Exception: Whatever is no refusal by a config key.
    """
    try:
        run()
    except ValueError as error:
        if any(key in str(error) for key in REFUSED):
            return str(error)
        raise
    return ''


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


def classes(stock: Stock, folder: Path) -> str:
    """The default head's classes by KD and SEL."""
    losses = dict(kd=dict(**KD), sel=dict(**SEL))

    def run() -> None:
        # An untrained teacher may win nowhere, so SEL may be 0.
        train(distil(stock, folder, losses), stock, ('kd',))

    return refusal(run)


def boxes(stock: Stock, folder: Path) -> str:
    """Boxes of the default head by KD."""
    # An untrained CenterNet's boxes have no area.
    losses = dict(kd=dict(**KD, box=dict(weight=1.0, distance='l1')))

    def run() -> None:
        train(distil(stock, folder, losses), stock, ('kd', 'kd_box'))

    return refusal(run)


def masks(stock: Stock, folder: Path) -> str:
    """Mask pixels by KD, of the first mask head that there is."""
    model = detectors.build(stock)
    for head in MASK_HEADS:
        try:
            model.get_submodule(head)
        except AttributeError:
            continue

        def run(head: str = head) -> None:
            train(distil(stock, folder, dict(kd=dict(**KD, head=head))), stock, ('kd',))

        return refusal(run)
    return 'none'


def fit(stock: Stock, folder: Path) -> str:
    """FIT by unit on the default head."""

    def run() -> None:
        train(distil(stock, folder, dict(kd=dict(**KD)), fit=FIT), stock, ('kd',))

    return refusal(run)


def features(stock: Stock, folder: Path) -> str:
    """A loss of the backbone's maps, with a connector."""

    def run() -> None:
        train(distil(stock, folder, FEATURES), stock, ('cwd',))

    return refusal(run)


def together(stock: Stock, folder: Path) -> str:
    """Two networks that learn together."""

    def run() -> None:
        torch.manual_seed(0)
        students = dict(a=detectors.config(stock), b=detectors.config(stock, 2))
        model = CollaborativeDistiller(students, second=dict(type='MinLoss'))
        model.init_weights()
        losses = detectors.losses_of(model, stock)
        model.parse_losses(losses)[0].backward()
        assert any(name.startswith('a/loss_kl') for name in losses), sorted(losses)

    return refusal(run)


COLUMNS = dict(
    classes=classes, boxes=boxes, masks=masks, fit=fit, features=features, together=together
)
