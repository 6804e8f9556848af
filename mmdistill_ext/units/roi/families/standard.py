"""Faster and Mask R-CNN, and RoI heads that differ from them in a method or two."""

from mmdet.models.roi_heads import DoubleHeadRoIHead, DynamicRoIHead, StandardRoIHead

from mmdistill_ext.units.roi.family import ROI_FAMILIES, RoIFamily


@ROI_FAMILIES.register(StandardRoIHead)
class Standard(RoIFamily):
    """Faster R-CNN (https://arxiv.org/abs/1506.01497), Mask R-CNN, with their subclasses.

    Mask Scoring R-CNN and PointRend add a head beside the mask head; boxes and (coarse) masks are
    those of Mask R-CNN.
    """


@ROI_FAMILIES.register(DoubleHeadRoIHead)
class DoubleHead(Standard):
    """Double-Head R-CNN (https://arxiv.org/abs/1904.06493): boxes see enlarged RoIs."""


@ROI_FAMILIES.register(DynamicRoIHead)
class Dynamic(Standard):
    """Dynamic R-CNN (https://arxiv.org/abs/2004.06002): thresholds follow the training."""

    unsplit = (
        'its RoI head adapts its thresholds to every loss that it forms, also to those that '
        '`fit` measures'
    )
