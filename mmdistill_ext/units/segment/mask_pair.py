"""Units of MaskFormers' masks: the pixels of matched segments (SEL-1, SEL-7)."""

from __future__ import annotations

from mmdistill_ext.units.base import Units
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.painters import MaskRegions
from mmdistill_ext.units.segment.pair import SegmentPair
from mmdistill_ext.units.segment.step import SegmentStep


class SegmentMaskPair(SegmentPair):
    """Pairs the masks of queries that were matched to the same segment, pixel by pixel.

    As in a binary segmenter a pixel is inside or outside. Units are the pixels of the student's
    masks, all of them; the head's own loss looks at some or at all of those of the image.
    """

    sigmoid = True
    background = False
    predicts = False
    num_classes = 2

    @staticmethod
    def head_of(path: str) -> str:
        """Path of the whole head, given that of its layers for masks."""
        return path.rpartition('.')[0]

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set; the labels are only outside and inside."""
        return self.head.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, whatever the data's classes are."""
        return ('outside', 'inside')

    def build(self, step: SegmentStep) -> Units:
        """The units, one pixel of a segment's mask each (SEL-1)."""
        return Units(
            student=step.pick_masks(step.student_layer[1], step.student_queries),
            teacher=step.pick_masks(step.teacher_layer[1], step.teacher_queries),
            labels=step.masks.long(),
            ignore_index=IGNORED,
            sigmoid=True,
            paint=MaskRegions(size_of(step.samples), len(step.samples), step.index[:1]),
        )
