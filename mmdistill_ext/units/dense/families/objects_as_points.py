"""CenterNet (https://arxiv.org/abs/1904.07850)."""

from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import CenterNetHead
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.families.heatmaps import STRIDE, Heatmaps
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned
from mmdistill_ext.units.painters import Levels

SMALLEST = 1e-6
"""Scores below this, or as near to 1, have no gradient."""


@DENSE_FAMILIES.register(CenterNetHead)
class CenterNet(Heatmaps):
    """Pixels of the heatmaps; offset of the centre and size, in pixels of the heatmaps.

    A pixel where an object has its centre is positive, with the class of that object; all others
    are background, also those next to it, whose weight is reduced in the head's own loss.
    """

    loss_methods = ('get_targets', 'loss_by_feat')

    @property
    def priors_per_location(self) -> list[int]:
        """One pixel at each place."""
        return [1]

    def priors(self, sizes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        """Column and row of each pixel, ``(n, 2)``."""
        ((height, width),) = sizes
        rows, columns = torch.meshgrid(
            torch.arange(height, device=like.device, dtype=like.dtype),
            torch.arange(width, device=like.device, dtype=like.dtype),
            indexing='ij',
        )
        return [torch.stack((columns.flatten(), rows.flatten()), 1)]

    def outputs(self, predicted: Sequence) -> Sequence[Sequence[Tensor]]:
        """Logits of the heatmaps, which the head gives as scores, and offset and size."""
        heatmaps, sizes, offsets = predicted[:3]
        scores = [full_precision(x).logit(SMALLEST) for x in heatmaps]
        parts = zip(offsets, sizes, strict=True)
        return scores, [torch.cat(part, 1) for part in parts]

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from offset and size."""
        boxes = torch.cat((priors + predicted[:, :2], predicted[:, 2:]), 1)
        return bbox_cxcywh_to_xyxy(boxes) * strides[:, None]

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from targets, which are encoded as predictions are."""
        return self.decode(priors, strides, targets)

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: heatmaps, and offset and size at the centres.

        Raises:
            ValueError: The heatmaps are not a quarter of the images in size.
        """
        call = calls[-1]
        self._check_stride(call.args[2][-2:], call.args[3][:2])
        targets = call.output[0]
        heatmap, centre = (
            self.flatten([targets[name]], channels)
            for name, channels in (
                ('center_heatmap_target', self.num_classes),
                ('wh_offset_target_weight', 2),
            )
        )
        labels = heatmap.argmax(-1).where(centre[..., 0] > 0, self.num_classes)
        boxes = torch.cat((targets['offset_target'], targets['wh_target']), 1)
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, self.flatten([boxes], 4), every)

    def _check_stride(self, maps: Sequence[int], image: Sequence[int]) -> None:
        if [STRIDE * side for side in maps] != list(image):
            raise ValueError(
                f'Heatmaps of CenterNet should have a side of 1 / {STRIDE} of the image. Found '
                f'{tuple(maps)} for an image of {tuple(image)}.'
            )
