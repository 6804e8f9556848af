"""How mask heads of two-stage detectors encode masks."""

from __future__ import annotations

from typing import Any, ClassVar

from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import nn

from mmdistill_ext.units.by_class import ByClass


class MaskHeadFamily:
    """Reads one kind of mask head: one logit per pixel and class (SEL-7).

    The masks of HTC, SCNet, Mask Scoring R-CNN and PointRend (its coarse masks) are of this kind.

    Args:
        head: The mask head.
    """

    loss_methods: ClassVar[tuple[str, ...]] = ('get_targets', 'loss_and_target')
    """Methods that a subclass of the registered class must not override."""

    def __init__(self, head: nn.Module) -> None:
        self.head: Any = head


MASK_HEADS: ByClass[type[MaskHeadFamily]] = ByClass()
"""Class of a mask head -> its family."""

MASK_HEADS.register(FCNMaskHead)(MaskHeadFamily)
