"""The contract that every loss under a distiller's ``losses`` keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from mmdistill_ext.losses.records import Records
    from mmdistill_ext.units.pair import HeadPair


class DistillLoss(nn.Module, ABC):
    """A named loss between student and teacher.

    It sees either the *units* that two heads predict (pixels, anchors, RoIs, queries; see
    :class:`~mmdistill_ext.units.base.Units`), or *features* that were tapped in both models (see
    :class:`~mmdistill_ext.units.features.base.Features`): :attr:`takes_features` says which. In the
    config of the former stand ``head`` and ``teacher_head``, of the latter ``tap`` and
    ``teacher_tap``.

    Whatever it learns itself (parameters) or remembers from step to step (persistent buffers)
    becomes part of the student as ``connectors.<name of the loss>.loss``: it is in the optimizer,
    DDP, EMA and the training checkpoint, and it is left out when the student is exported.

    Example:
        >>> import torch
        >>> class SquaredLoss(DistillLoss):
        ...     takes_features = True
        ...
        ...     def forward(self, features, weight=1.0):
        ...         return dict(loss=weight * (features.student - features.teacher).square().mean())
    """

    takes_features: ClassVar[bool] = False
    """The loss is of tapped features instead of units."""

    forms_own_loss: ClassVar[bool] = False
    """The loss forms the head's own loss too when ``units.fused`` is set, and splits it when
    ``units.split`` is: it may stand in for the head's own loss (``fuse_task_loss``, ``fit``)."""

    any_channels: ClassVar[bool] = False
    """A loss of features that compares features of different numbers of channels."""

    records: Records
    """What a loss with ``forms_own_loss`` keeps for hooks; others need none."""

    def check(self, pair: HeadPair) -> None:
        """Refuse heads that the loss does not fit; asked once, before the first step.

        Args:
            pair: The two heads. Not called for losses of features.

        Raises:
            ValueError: The message names the argument of the loss, the rule and what was found.
        """

    @abstractmethod
    def forward(self, data: Any, weight: float = 1.0) -> dict[str, Tensor]:
        """Form the loss.

        Args:
            data: :class:`~mmdistill_ext.units.base.Units` of two heads, or
                :class:`~mmdistill_ext.units.features.base.Features` of two taps.
            weight: Factor of the distillation at this iteration, > 0.

        Returns:
            Scalars by name: ``loss`` is logged as ``loss_<name of the loss>``, ``loss_<x>`` as
            ``loss_<name of the loss>_<x>``; both are added to what the model is trained with.
            Other scalars are logged only. Without anything to learn from, a loss is exactly 0.
        """
