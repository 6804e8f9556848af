"""CornerNet (https://arxiv.org/abs/1808.01244) and CentripetalNet (2003.09119)."""

from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import CentripetalHead, CornerHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.base import Painter
from mmdistill_ext.units.dense.families.heatmaps import Heatmaps
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned
from mmdistill_ext.units.painters import Levels, Stretched

CORNERS = ('topleft_heatmap', 'bottomright_heatmap')


@DENSE_FAMILIES.register(CornerHead)
class Corners(Heatmaps):
    """Pixels of two heatmaps, of top left and of bottom right corners, and no boxes.

    Heatmaps are those of the last of the stacked networks, which the head predicts with. A pixel
    where an object has the corner is positive, with the class of that object; all others are
    background, also those next to it, whose weight is reduced in the head's own loss.
    """

    loss_methods = ('get_targets', 'loss_by_feat', 'loss_by_feat_single')
    has_boxes = False

    @property
    def priors_per_location(self) -> list[int]:
        """Two corners at each place."""
        return [len(CORNERS)]

    def base_anchors(self, places: Sequence[int]) -> Tensor:
        """The corners, as places within a box."""
        return torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])

    def levels(self, sizes: Sequence[tuple[int, int]]) -> Levels:
        """Where the pixels of the last heatmaps lie."""
        return super().levels(sizes[-1:])

    def outputs(self, predicted: Sequence) -> Sequence[Sequence[Tensor]]:
        """Class logits of the corners of both kinds, ``(B, 2 * C, H, W)``."""
        return ([torch.cat([maps[-1] for maps in predicted[: len(CORNERS)]], 1)],)

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: where a heatmap is 1, a corner of an object of its class is."""
        targets = calls[-1].output
        both = [torch.cat([targets[name] for name in CORNERS], 1)]
        heat, classes = self.flatten(both, self.num_classes).max(-1)
        labels = classes.where(heat == 1, self.num_classes)
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, labels.new_zeros(*labels.shape, 4), every)

    def painter(self, levels: Levels, size: tuple[int, int]) -> Painter:
        """Maps of the corners, stretched over the batch's images."""
        return Stretched(levels, size)


@DENSE_FAMILIES.register(CentripetalHead)
class CentripetalCorners(Corners):
    """CornerNet whose corners point to the centre of their object."""
