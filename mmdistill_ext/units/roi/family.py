"""What has to be known of a two-stage detector's RoI head: how it is read and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from mmdistill_ext.taps import Call
from mmdistill_ext.units.by_class import ByClass

Context = Mapping[str, Tensor | None]
"""Keyword arguments that a RoI head works out from the features once, for all RoIs."""


class BoxCall(NamedTuple):
    """What a box head predicted for the RoIs that were sampled for its loss."""

    scores: Tensor  # (n, channels)
    boxes: Any  # as the box head encodes them, a tensor or several; None without boxes
    rois: Tensor  # (n, 5), image and corners
    sampling_results: list


class RoIFamily:
    """Reads and runs the box and mask heads of one kind of RoI head (SEL-7).

    This class fits a RoI head with one box head and one mask head. Subclasses override what
    differs.

    Args:
        roi_head: The RoI head.
    """

    trains: ClassVar[tuple[str, ...]] = ('loss', 'bbox_loss', 'predict')
    """Methods that a student's RoI head must not override: its sampling would be read wrongly."""
    runs: ClassVar[tuple[str, ...]] = ('_bbox_forward', '_mask_forward')
    """Methods that run a head on given RoIs; no RoI head may override them."""
    unsplit: ClassVar[str] = ''
    """Why FIT cannot split the losses of a student, a clause; empty where it can."""
    sampled_by: ClassVar[str] = '{head}.loss_and_target'
    """Path of the method that is called once for the sampled RoIs of a box head."""

    def __init__(self, roi_head: nn.Module) -> None:
        self.roi_head: Any = roi_head

    @property
    def looks(self) -> int:
        """How often a student sees each image: the batch's images come so many times, in turn."""
        return 1

    @property
    def teaches(self) -> bool:
        """Whether a teacher looks at each image once."""
        return True

    def predicts(self, stage: tuple[int, ...]) -> bool:
        """Whether the detector predicts with the head of this stage."""
        return True

    def loss_weight(self, stage: tuple[int, ...], method: str) -> float:
        """Factor that the RoI head multiplies the losses of a head by.

        Args:
            stage: Number of the stage of a cascade; empty for the only one.
            method: ``'_bbox_forward'`` or ``'_mask_forward'``.
        """
        return 1.0

    def box_call(self, call: Call) -> BoxCall:
        """What a box head predicted, from the call of :attr:`sampled_by`."""
        names = ('cls_score', 'bbox_pred', 'rois', 'sampling_results')
        return BoxCall(*(call.kwargs[name] for name in names))

    def context(self, features: tuple[Tensor, ...]) -> Context:
        """What :meth:`run` wants to know of all RoIs of a batch."""
        return {}

    def run(
        self,
        method: str,
        stage: tuple[int, ...],
        features: tuple[Tensor, ...],
        rois: Tensor,
        context: Context,
    ) -> dict[str, Any]:
        """Run a head on given RoIs.

        Args:
            method: ``'_bbox_forward'`` or ``'_mask_forward'``.
            stage: Number of the stage of a cascade; empty for the only one.
            features: Maps of the neck.
            rois: Image and corners of each RoI, ``(n, 5)``.
            context: What :meth:`context` gave for these features.

        Returns:
            ``cls_score`` and ``bbox_pred``, or ``mask_preds``.
        """
        return getattr(self.roi_head, method)(*stage, features, rois, **context)


ROI_FAMILIES: ByClass[type[RoIFamily]] = ByClass()
"""Class of a RoI head -> its family. A family outside of this package is registered in the same
way, in a module that the config names under ``custom_imports``."""
