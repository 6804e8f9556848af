"""RTMDet (https://arxiv.org/abs/2212.07784)."""

from mmdet.models.dense_heads import RTMDetHead
from mmdet.structures.bbox import distance2bbox
from torch import Tensor

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(RTMDetHead)
class RTMDet(DenseFamily):
    """One point per location, distances of the sides in pixels, quality targets."""

    labels_at = 1
    targets_are_boxes = True

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from the distances to the point."""
        return distance2bbox(priors[:, :2], predicted)
