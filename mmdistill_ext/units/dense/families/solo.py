"""SOLO (https://arxiv.org/abs/1912.04488) and SOLOv2 (https://arxiv.org/abs/2003.10152)."""

from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import DecoupledSOLOHead, SOLOHead, SOLOV2Head
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.base import Painter
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels, Stretched


@DENSE_FAMILIES.register(SOLOHead)
class SOLO(DenseFamily):
    """Cells of a grid over the image, one grid per level, with classes and without boxes.

    A level is known by the number of its cells along a side, which stands for the stride.
    """

    loss_methods = ('_get_targets_single', 'loss_by_feat')
    targets = '_get_targets_single'
    needs_assigner = False
    has_boxes = False
    teacher_trains = True  # otherwise it suppresses all but local maxima
    unsplit = 'that of a mask belongs to all of its pixels at once'
    scores_at = 1

    @property
    def sigmoid(self) -> bool:
        """The classes are independent sigmoids; otherwise one softmax with background as last."""
        return self.head.loss_cls.use_sigmoid

    @property
    def strides(self) -> list[int]:
        """Number of cells along a side of each level's grid."""
        return list(self.head.num_grids)

    @property
    def priors_per_location(self) -> list[int]:
        """One cell at each place, for each level."""
        return [1] * len(self.head.num_grids)

    def outputs(self, predicted: Sequence) -> Sequence[Sequence[Tensor]]:
        """Class logits of each level."""
        return (predicted[self.scores_at],)

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: one call per image, with the labels of each level's cells."""
        labels = torch.stack([torch.cat([x.flatten() for x in call.output[1]]) for call in calls])
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, labels.new_zeros(*labels.shape, 4), every)

    def painter(self, levels: Levels, size: tuple[int, int]) -> Painter:
        """Maps of the grids, stretched over the batch's images."""
        return Stretched(levels, size, 'grid')


@DENSE_FAMILIES.register(DecoupledSOLOHead)
class DecoupledSOLO(SOLO):
    """SOLO whose masks are products of two; classes follow both of them."""

    scores_at = 2


@DENSE_FAMILIES.register(SOLOV2Head)
class SOLOv2(SOLO):
    """SOLO whose cells predict the filters of their masks."""

    teacher_trains = False
