"""A head's own loss, split into simple and hard rows while the head forms it (FIT-4, FIT-5).

Heads of mmdet form their losses in many ways, but all by loss modules that take one row per unit
and ``weight``, ``avg_factor`` and ``reduction_override``. Those modules are asked for the losses of
their rows, which are then weighted and reduced as the modules themselves would do it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdistill_ext.functional.add_up import add_up
from mmdistill_ext.functional.fit import weigh_rows
from mmdistill_ext.taps import wrapped

EPS = torch.finfo(torch.float32).eps
"""Added to ``avg_factor``, as mmdet's ``weight_reduce_loss`` does."""

Target = Any
"""What a loss module compares with: a tensor, or a tuple of several."""


class OwnLoss:
    """Weights the rows of a head's loss modules by ``F(x)`` where they are hard (FIT-4).

    Args:
        head: The head; its children ``*loss_*`` are its loss modules.
        hard_weight: ``F(x)``, >= 0.

    Attributes:
        row_mask: Gives, by the name of a loss module, which rows of its present call are simple,
            bool of the rows' shape; None leaves that call alone.
    """

    def __init__(self, head: nn.Module, hard_weight: float) -> None:
        self.modules = loss_modules(head)
        self.hard_weight = hard_weight
        self.row_mask: Callable[[str], Tensor | None] = lambda name: None
        self._calls: list[tuple[Tensor, Tensor]] = []  # of each module call: loss, its two parts

    @contextmanager
    def __call__(self) -> Iterator[OwnLoss]:
        """Split the losses that the modules form within."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.enter_context(wrapped(module, 'forward', self._wrap(name, module)))
            yield self

    def _wrap(self, name: str, module: nn.Module) -> Callable:
        def wrap(forward: Callable) -> Callable:
            def weighed(pred: Tensor, target: Target, *args: Any, **kwargs: Any) -> Tensor:
                rows_only = kwargs.get('reduction_override') == 'none'  # no loss yet
                simple = None if rows_only else self.row_mask(name)
                if simple is None:
                    return forward(pred, target, *args, **kwargs)
                whole = self.hard_weight == 1  # then the module's own sum, to the bit
                with torch.set_grad_enabled(torch.is_grad_enabled() and not whole):
                    rows, divisor = row_losses(module, forward, pred, target, *args, **kwargs)
                if rows.ndim == 0 or not rows.numel():  # no row counts
                    return forward(pred, target, *args, **kwargs)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not whole):
                    if len(rows) != len(simple):  # several to a unit, the sides of a box
                        simple = simple.repeat_interleave(len(rows) // len(simple))
                    total, parts = weigh_rows(rows, simple, self.hard_weight)
                    total, parts = total / divisor, parts / divisor
                if whole:
                    total = forward(pred, target, *args, **kwargs)
                self._calls.append((total, parts))
                return total

            return weighed

        return wrap

    def parts(self, losses: Mapping[str, Tensor | list[Tensor]]) -> Tensor:
        """The two parts of the head's finished losses, before ``F(x)``, without gradient (FIT-5).

        A head may rescale a module's loss afterwards (by all ranks' positives, say).
        d(total)/d(module loss) is that factor, so autograd gives it for any head.

        Args:
            losses: The head's losses by name, before the backward pass.

        Returns:
            ``(2,)``: the loss of the simple and of the hard rows.
        """
        final = total_loss(losses)
        calls = [(total, parts) for total, parts in self._calls if total.requires_grad]
        if not calls:
            return final.new_zeros(2).detach()
        totals, parts = zip(*calls, strict=True)
        scales = torch.autograd.grad(final, totals, retain_graph=True, materialize_grads=True)
        scaled = [scale.sum() * part for scale, part in zip(scales, parts, strict=True)]
        return torch.stack(scaled).sum(0)


def row_losses(
    module: Any,
    forward: Callable,
    pred: Tensor,
    target: Target,
    weight: Tensor | None = None,
    avg_factor: float | Tensor | None = None,
    reduction_override: str | None = None,
    **kwargs: object,
) -> tuple[Tensor, float | Tensor]:
    """The loss of each row of a loss module, and what the module divides their sum by.

    Returns:
        ``(n, ...)`` (a scalar 0 where no row counts), and the divisor.
    """
    if getattr(
        module, 'use_mask', False
    ):  # its third argument holds the classes; it takes no other
        logits = pred[torch.arange(len(pred), device=pred.device), weight]
        rows = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
        return rows * module.loss_weight, rows.numel()
    rows = forward(
        pred, target, weight=weight, avg_factor=None, reduction_override='none', **kwargs
    )
    if (reduction_override or module.reduction) == 'sum':
        return rows, 1
    return rows, rows.numel() if avg_factor is None else avg_factor + EPS


def loss_modules(head: nn.Module) -> dict[str, nn.Module]:
    """The loss modules of a head, by name, such as ``'loss_cls'`` and TOOD's initial one.

    A child without a ``forward``, such as DDQ's losses of dense queries, has modules of its own.
    """
    return {
        name: child
        for name, child in head.named_children()
        if 'loss_' in name and type(child).forward is not nn.Module.forward
    }


def check_loss_modules(head: nn.Module, key: str) -> None:
    """Refuse a head whose losses cannot be asked for their rows.

    Raises:
        ValueError: There are none, or one does not give one loss per row.
    """
    needed = {'avg_factor', 'reduction_override'}
    modules = loss_modules(head)
    for name, module in modules.items():
        arguments = inspect.signature(module.forward).parameters
        weighted_mask = (
            getattr(module, 'use_mask', False) and getattr(module, 'class_weight', None) is not None
        )
        whole = getattr(module, 'avg_non_ignore', False) or hasattr(module, 'get_cls_channels')
        if not needed <= arguments.keys() or whole or weighted_mask:
            raise ValueError(
                f"`{key}` needs loss modules that give one loss per unit (mmdet's "
                f'`reduction_override`). Found {type(module).__name__} in `{name}` of '
                f'{type(head).__name__}.'
            )
    if not modules:
        raise ValueError(f'`{key}` needs a head with loss modules. Found {type(head).__name__}.')


def total_loss(losses: Mapping[str, Tensor | list[Tensor]]) -> Tensor:
    """Sum of named losses, as mmengine's ``parse_losses`` adds them up."""
    return add_up(
        item.mean()
        for value in losses.values()
        for item in (value if isinstance(value, list | tuple) else [value])
    )
