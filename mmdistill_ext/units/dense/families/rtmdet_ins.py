"""RTMDet-Ins (https://arxiv.org/abs/2212.07784)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import RTMDetInsHead
from torch import Tensor

from mmdistill_ext.units.dense.families.rtmdet import RTMDet
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, SplitLevels
from mmdistill_ext.units.split.own_loss import OwnLoss


@DENSE_FAMILIES.register(RTMDetInsHead)
class RTMDetIns(RTMDet):
    """RTMDet whose points also predict the filters of their masks."""

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Class logits, boxes and filters of each level, without the features of the masks."""
        return predicted[:3]

    @contextmanager
    def tell_rows(self, own: OwnLoss, split: SplitLevels) -> Iterator[None]:
        """Tell the rows of each level, and those of the masks: positive points, image by image."""
        with super().tell_rows(own, split):
            of_level = own.row_mask

            def row_mask(name: str) -> Tensor | None:
                if name != 'loss_mask':
                    return of_level(name)
                simple, positive = (torch.cat(x, 1) for x in zip(*split(), strict=True))
                return simple[positive]

            own.row_mask = row_mask
            yield
