"""What a distilled student carries where its teacher is not at hand: it predicts all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from mmdistill_ext.distillers.loss_guard import LossGuard


class MissingTeacher:
    """Stands in for a :class:`~mmdistill_ext.distillers.distillation.Distillation`.

    Args:
        error: Why there is none; raised when a training wants it.
    """

    def __init__(self, error: OSError) -> None:
        self.error = error
        self.guard = LossGuard()

    def start(self) -> NoReturn:
        """Refuse to train.

        Raises:
            OSError: What was missing when the model was built.
        """
        raise self.error

    def step(
        self,
        student: nn.Module,
        student_loss: Callable[..., dict],
        inputs: Tensor,
        data_samples: list | None,
    ) -> NoReturn:
        """Refuse to form a loss.

        Raises:
            OSError: What was missing when the model was built.
        """
        self.start()

    def trainables(self) -> nn.ModuleDict:
        """Nothing is learned."""
        return nn.ModuleDict()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """There is nothing to move or to cast."""

    def set_device(self, device: torch.device) -> None:
        """There is nothing on a device."""
