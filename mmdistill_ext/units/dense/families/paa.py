"""PAA (https://arxiv.org/abs/2007.08103)."""

import torch
from mmdet.models.dense_heads import PAAHead

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(PAAHead)
class PAA(DenseFamily):
    """One anchor per location, box deltas; labels are those after the probabilistic assignment.

    Anchors that the first assignment called positive and the mixture model did not are background.
    """

    loss_methods = (*DenseFamily.loss_methods, 'paa_reassign')
    targets = 'paa_reassign'
    more_targets = ('get_targets',)
    row_order = 'image_first'

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: one call per image, boxes from the first assignment of all images."""
        labels, weights = (torch.stack([call.output[i] for call in calls]) for i in (0, 1))
        boxes = torch.stack(more[0][-1].output[2])
        return Assigned(labels, weights > 0, boxes, weights > 0)
