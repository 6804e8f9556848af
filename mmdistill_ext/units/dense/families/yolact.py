"""Box head of YOLACT (https://arxiv.org/abs/1904.02689)."""

from mmdet.models.dense_heads import YOLACTHead

from mmdistill_ext.units.base import Painter
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily
from mmdistill_ext.units.painters import Levels, Stretched


@DENSE_FAMILIES.register(YOLACTHead)
class YOLACT(DenseFamily):
    """Several anchors per location at strides that are no whole numbers; softmax with background.

    The head's own loss counts only the background anchors with the largest losses; as units all of
    them are compared and distilled.
    """

    unsplit = 'this one picks the background anchors with the largest losses'

    @property
    def strides(self) -> list[int]:
        """Stride of each level in pixels, rounded."""
        return [round(stride[0]) for stride in self.head.prior_generator.strides]

    def painter(self, levels: Levels, size: tuple[int, int]) -> Painter:
        """Maps of the levels, stretched over the batch's images."""
        return Stretched(levels, size)
