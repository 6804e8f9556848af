"""The two kinds of heads on RoIs: boxes with classes, and masks."""

from __future__ import annotations

from torch import nn

from mmdistill_ext.units.detector_pair import FEATURES_INSTEAD
from mmdistill_ext.units.roi.box_head import BOX_HEADS, BoxHeadFamily
from mmdistill_ext.units.roi.head import RoIHead
from mmdistill_ext.units.roi.mask_head import MASK_HEADS


class BoxHead(RoIHead):
    """A box head with one softmax over classes and background, and mostly with boxes.

    Args:
        model: A two-stage detector.
        path: Path of the head.
        key: The config key to name in errors.
        trains: The head is that of a student.

    Attributes:
        sampled_tap: Path of the method that is called once for the RoIs that were sampled.

    Raises:
        ValueError: The path leads to no such head.
    """

    heads = BOX_HEADS
    method = '_bbox_forward'
    reader: BoxHeadFamily

    def __init__(self, model: nn.Module, path: str, key: str, trains: bool = False) -> None:
        super().__init__(model, path, key, trains)
        self.sampled_tap = self.family.sampled_by.format(head=self.path)
        problem = self.reader.classes_problem
        if problem:
            raise ValueError(
                f'`{key}` should lead to a box head with one softmax over classes and background. '
                f'Found {problem} in {path!r}, a {type(self.head).__name__}. {FEATURES_INSTEAD}'
            )


class MaskHead(RoIHead):
    """A mask head with one sigmoid per pixel and class; see :class:`RoIHead`."""

    heads = MASK_HEADS
    method = '_mask_forward'
