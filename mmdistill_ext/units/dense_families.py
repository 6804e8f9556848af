"""How each family of single-stage heads lays out predictions and assigned targets.

Everything is flattened to ``(B, N, ...)`` as mmdet does it: levels one after the other, within a
level rows, columns, priors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead, RTMDetHead
from mmdet.structures.bbox import distance2bbox
from torch import Tensor, nn

from mmdistill_ext.units.base import Level


class Assigned(NamedTuple):
    """The student's own target assignment."""

    labels: Tensor  # (B, N), the head's number of classes for background
    valid: Tensor  # (B, N) bool
    boxes: Tensor  # (B, N, 4), decoded


class DenseFamily:
    """A head whose ``get_targets`` gives labels, weights and box targets level by level.

    Args:
        head: The head.
    """

    kind: type
    first = 0  # place of the labels in what `get_targets` returns

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def priors(self, sizes: list[torch.Size], like: Tensor) -> Tensor:
        """``(N, 2 or 4)``, points or anchors."""
        return torch.cat(
            self.head.prior_generator.grid_priors(sizes, dtype=like.dtype, device=like.device)
        )

    def strides(self, sizes: list[torch.Size], like: Tensor) -> Tensor:
        """``(N,)``, the stride of each unit in pixels."""
        return torch.cat(
            [
                like.new_full((level.height * level.width * level.priors,), float(level.stride))
                for level in self.levels(sizes)
            ]
        )

    def levels(self, sizes: list[torch.Size]) -> tuple[Level, ...]:
        """Where the units lie."""
        generator = self.head.prior_generator
        levels = zip(sizes, generator.num_base_priors, generator.strides, strict=True)
        return tuple(Level(*size, priors, int(stride[0])) for size, priors, stride in levels)

    def flatten(self, maps: list[Tensor], channels: int) -> Tensor:
        """``(B, A * channels, H, W)`` of each level -> ``(B, N, channels)``."""
        return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, channels) for m in maps], 1)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """What the head predicts for boxes, ``(B, N, D)`` -> boxes ``(B, N, 4)``."""
        flat = self.head.bbox_coder.decode(
            priors.repeat(len(predicted), 1), predicted.flatten(0, 1)
        )
        return flat.view(*predicted.shape[:2], 4)

    def box_channels(self) -> int:
        """Numbers that the head predicts per box."""
        return 4

    def distribution(self, predicted: Tensor) -> Tensor | None:
        """``(B, N, 4, n)`` logits over the distances of the sides, of heads that predict them."""
        return None

    def assigned(self, targets: tuple, priors: Tensor, strides: Tensor) -> Assigned:
        """Read what ``get_targets`` returned."""
        labels, weights, boxes = (
            torch.cat(targets[place], 1) for place in range(self.first, self.first + 3)
        )
        return Assigned(labels, weights > 0, self.target_boxes(boxes, priors, strides))

    def target_boxes(self, targets: Tensor, priors: Tensor, strides: Tensor) -> Tensor:
        """Box targets as boxes."""
        if getattr(self.head, 'reg_decoded_bbox', True):
            return targets
        return DenseFamily.decode(self, priors, strides, targets)


class Retina(DenseFamily):
    """RetinaNet: anchors, deltas."""

    kind = RetinaHead


class ATSS(DenseFamily):
    """ATSS: one anchor, deltas, decoded targets."""

    kind = ATSSHead
    first = 1


class GFL(DenseFamily):
    """GFL: one anchor, distributions over the distances of the sides, quality targets."""

    kind = GFLHead
    first = 1

    def box_channels(self) -> int:
        """Four sides, ``reg_max + 1`` distances."""
        return 4 * (self.head.reg_max + 1)

    def distribution(self, predicted: Tensor) -> Tensor:
        """``(B, N, 4, reg_max + 1)``."""
        return predicted.view(*predicted.shape[:2], 4, -1)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Expected distances from the anchor's centre."""
        distances = self.head.integral(predicted.flatten(0, 1)).view(*predicted.shape[:2], 4)
        centers = self.head.anchor_center(priors)
        return distance2bbox(centers.expand(len(predicted), -1, 2), distances * strides[:, None])

    def target_boxes(self, targets: Tensor, priors: Tensor, strides: Tensor) -> Tensor:
        """They are boxes."""
        return targets


class RTMDet(DenseFamily):
    """RTMDet: points, distances, quality targets."""

    kind = RTMDetHead
    first = 1

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Distances from the point, in pixels."""
        return distance2bbox(priors[:, :2].expand(len(predicted), -1, 2), predicted)

    def target_boxes(self, targets: Tensor, priors: Tensor, strides: Tensor) -> Tensor:
        """They are boxes."""
        return targets


class FCOS(DenseFamily):
    """FCOS: points, distances, in strides while training if ``norm_on_bbox``; no weights."""

    kind = FCOSHead

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Distances from the point."""
        if self.head.norm_on_bbox and self.head.training:
            predicted = predicted * strides[:, None]
        return super().decode(priors, strides, predicted)

    def assigned(self, targets: tuple, priors: Tensor, strides: Tensor) -> Assigned:
        """Levels of images one after the other; every point has a label."""
        images = sum(map(len, targets[0])) // len(priors)
        labels = torch.cat([level.view(images, -1) for level in targets[0]], 1)
        distances = torch.cat([level.view(images, -1, 4) for level in targets[1]], 1)
        if self.head.norm_on_bbox:  # in eval mode too
            distances = distances * strides[:, None]
        boxes = DenseFamily.decode(self, priors, strides, distances)
        return Assigned(labels, torch.ones_like(labels, dtype=torch.bool), boxes)


OWN_LOSS = ('get_targets', '_get_targets_single', 'loss_by_feat', 'loss_by_feat_single')
FAMILIES = (RTMDet, GFL, ATSS, FCOS, Retina)


def find_family(head: nn.Module) -> DenseFamily | None:
    """The family of a head, None when it has another assignment or loss than its kin."""
    for family in FAMILIES:
        if isinstance(head, family.kind):
            same = all(
                getattr(type(head), name, None) is getattr(family.kind, name, None)
                for name in OWN_LOSS
            )
            return family(head) if same else None
    return None
