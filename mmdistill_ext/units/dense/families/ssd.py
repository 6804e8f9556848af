"""SSD (https://arxiv.org/abs/1512.02325), and with PISA (https://arxiv.org/abs/1904.04821)."""

from mmdet.models.dense_heads import PISASSDHead, SSDHead

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(SSDHead)
class SSD(DenseFamily):
    """Several anchors per location, as many as the level has; a softmax with background.

    The head's own loss counts only the background anchors with the largest losses; as units all of
    them are compared and distilled.
    """

    unsplit = 'this one picks the background anchors with the largest losses'


@DENSE_FAMILIES.register(PISASSDHead)
class PISASSD(SSD):
    """SSD whose positive anchors weigh more the better they are; labels are those of SSD."""
