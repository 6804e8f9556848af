"""The split of a head's own loss into that of simple and that of hard units (FIT-3, FIT-4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmdistill_ext.units.base import SplitResult, SplitRule
from mmdistill_ext.units.split.own_loss import OwnLoss


class HeadSplit(ABC):
    """Splits a head's own loss while the head forms it: its targets exist only then (FIT-4).

    Args:
        step: What is known of the step, with ``step.samples``, the batch's data samples.
        rule: How to split.
        head: The head, with its loss modules as children ``loss_*``.
        heads: Paths of the two heads that ``step`` is of.

    Attributes:
        loss: Weighs the rows of the head's loss modules.
    """

    def __init__(
        self, step: Any, rule: SplitRule, head: nn.Module, heads: tuple[str, str] = ('', '')
    ) -> None:
        self.step, self.rule, self.head, self.heads = step, rule, head, heads
        self.images = len(step.samples)
        self.loss = OwnLoss(head, rule.hard_weight)

    @property
    @abstractmethod
    def right(self) -> Tensor:
        """What the teacher has right: units ``(B, ...)``, or by image ``(B,)``, bool."""

    @property
    @abstractmethod
    def valid(self) -> Tensor:
        """Units that count, ``(B, ...)`` bool."""

    @abstractmethod
    def tell_rows(self) -> AbstractContextManager:
        """While it is entered, ``self.loss.row_mask`` says which rows of the head are simple."""

    @contextmanager
    def __call__(self) -> Iterator[HeadSplit]:
        """Split the loss that the head forms within."""
        with self.loss(), self.tell_rows():
            yield self

    @cached_property
    def simple(self) -> Tensor:
        """Simple units, ``(B, ...)`` bool: the right ones, or all of the right images."""
        if self.rule.by == 'unit':
            return self.right
        return self.right.view(-1, *[1] * (self.valid.ndim - 1)).expand(self.valid.shape)

    def result(self, losses: Mapping[str, Tensor | list[Tensor]]) -> SplitResult:
        """How the split turned out, for the units.

        Args:
            losses: The head's finished losses, before the backward pass.
        """
        counted = self.valid if self.rule.by == 'unit' else torch.ones_like(self.right)
        samples = torch.stack((self.right.sum(), counted.sum()))
        return SplitResult(samples, self.loss.parts(losses), self.images)
