"""Units of mask heads: the pixels of positive RoIs (SEL-1, SEL-7)."""

from __future__ import annotations

from mmdistill_ext.units.base import Units
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.roi.head_pair import RoIHeadPair
from mmdistill_ext.units.roi.heads import MaskHead
from mmdistill_ext.units.roi.mask_split import MaskSplit
from mmdistill_ext.units.roi.mask_step import MaskStep


class MaskPair(RoIHeadPair):
    """Pairs mask heads, pixel by pixel of the positive RoIs, in the mask of the assigned class.

    As in a binary segmenter a pixel is inside or outside. FIT splits by pixel, or by image: by the
    share of its pixels, over all RoIs, that the teacher gets right, as for a segmenter.
    """

    head_class = MaskHead
    losses_at = 'loss_mask'
    step_class = MaskStep
    split_class = MaskSplit
    background = False
    box_distances = ()
    sigmoid = True
    predicts = False
    num_classes = 2

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set; the labels are only outside and inside."""
        return self.head.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, whatever the data's classes are."""
        return ('outside', 'inside')

    def build(self, step: MaskStep) -> Units:
        """The units, one pixel of a RoI each (SEL-1)."""
        return Units(
            student=step.student_logits,
            teacher=step.teacher_logits,
            labels=step.labels,
            ignore_index=IGNORED,
            sigmoid=True,
            paint=BoxRegions(size_of(step.samples), step.count, (step.images,), step.rois[:, 1:]),
        )
