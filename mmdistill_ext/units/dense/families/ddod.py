"""DDOD (https://arxiv.org/abs/2107.02963)."""

from mmdet.models.dense_heads import DDODHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(DDODHead)
class DDOD(DenseFamily):
    """One anchor per location, box deltas; class and box are assigned each on its own.

    Labels are those of the class branch; boxes are compared where the box branch has an object.
    """

    loss_methods = (
        'get_cls_targets',
        'get_reg_targets',
        '_get_targets_single',
        'loss_by_feat',
        'loss_cls_by_feat_single',
        'loss_reg_by_feat_single',
    )
    targets = 'get_cls_targets'
    more_targets = ('get_reg_targets',)
    labels_at = 1
    unsplit = 'it assigns its boxes after it has formed the loss of its classes'

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read classes and boxes, each from an assignment of its own."""
        classes = super().assigned(calls, levels)
        boxes = super().assigned(more[0], levels)
        boxed = boxes.valid & (boxes.labels < self.num_classes)
        return classes._replace(targets=boxes.targets, boxed=boxed)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from deltas, which they are whatever ``reg_decoded_bbox``."""
        return self.decode(priors, strides, targets)
