"""How each family of single-stage heads lays out predictions and assigned targets.

Everything is flattened to ``(B, N, ...)`` as mmdet does it: levels one after the other, within a
level rows, columns, priors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RTMDetHead,
    YOLOXHead,
)
from mmdet.structures.bbox import distance2bbox
from torch import Tensor, nn

from mmdistill_ext.taps import Call, wrapped
from mmdistill_ext.units.painters import Level, Levels
from mmdistill_ext.units.split.own_loss import OwnLoss

LevelRows = Callable[[], list[tuple[Tensor, Tensor]]]
"""Gives simple and positive units ``(B, n)`` of each level."""


class Assigned(NamedTuple):
    """The student's own target assignment."""

    labels: Tensor  # (B, N), the head's number of classes for background
    valid: Tensor  # (B, N) bool, the unit is learned from
    targets: Tensor  # (B, N, 4), as the head encodes boxes; without meaning where background
    classified: Tensor  # (B, N) bool, its class is


class DenseFamily:
    """A head whose ``get_targets`` gives labels, weights and box targets level by level.

    Args:
        head: The head.
    """

    kind: type
    first = 0  # place of the labels in what the method of targets returns
    targets = 'get_targets'
    targets_are_boxes = False  # whatever `reg_decoded_bbox` says
    knows_background = True  # its classes are learned there too

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    @property
    def strides(self) -> list[int]:
        """Stride of each level, in pixels."""
        return [int(stride[0]) for stride in self.head.prior_generator.strides]

    def levels(self, sizes: Sequence[torch.Size]) -> Levels:
        """Where the units of all levels lie."""
        priors = self.head.prior_generator.num_base_priors
        parts = zip(sizes, priors, self.strides, strict=True)
        return Levels(Level(*size, count, stride) for size, count, stride in parts)

    def priors(self, sizes: Sequence[torch.Size], like: Tensor) -> list[Tensor]:
        """Points or anchors of each level, ``(n, 2 or 4)``."""
        generator = self.head.prior_generator
        return generator.grid_priors(sizes, dtype=like.dtype, device=like.device)

    def flatten(self, maps: Sequence[Tensor], channels: int) -> Tensor:
        """``(B, A * channels, H, W)`` of each level -> ``(B, N, channels)``."""
        locations = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        return locations.view(len(locations), -1, channels)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """What the head predicts for ``P`` boxes, ``(P, D)`` -> boxes ``(P, 4)``."""
        return self.head.bbox_coder.decode(priors, predicted)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Targets of ``P`` boxes -> boxes ``(P, 4)``."""
        if self.targets_are_boxes or self.head.reg_decoded_bbox:
            return targets
        return DenseFamily.decode(self, priors, strides, targets)

    def confidence(self, outputs: Sequence[Sequence[Tensor]], scores: Tensor) -> Tensor:
        """Scores in [0, 1], ``(B, N, classes)``, of a softmax with background as the last.

        Args:
            outputs: What the head gave, level by level.
            scores: Its first output, flattened.
        """
        if self.head.use_sigmoid_cls:
            return scores.sigmoid()
        return scores.softmax(-1)

    def box_channels(self) -> int:
        """Numbers that the head predicts per box."""
        return 4

    def distribution(self, predicted: Tensor) -> Tensor | None:
        """``(P, 4, n)`` logits over the distances of the sides, of heads that predict them."""
        return None

    def assigned(self, calls: list[Call], levels: Levels) -> Assigned:
        """Read what the method of targets returned; of all levels."""
        places = slice(self.first, self.first + 3)
        labels, weights, boxes = (torch.cat(part, 1) for part in calls[-1].output[places])
        return Assigned(labels, weights > 0, boxes, weights > 0)

    @contextmanager
    def rows(self, own: OwnLoss, split: LevelRows) -> Iterator[None]:
        """Tell the head's loss modules which of their rows are simple.

        Args:
            own: Takes part in the head's loss.
            split: Gives simple and positive units ``(B, n)`` of each level, once the head has its
                targets.
        """
        level, chosen = -1, {}

        def count(single):
            def counting(*args, **kwargs):
                nonlocal level
                level += 1
                return single(*args, **kwargs)

            return counting

        def rows(name: str) -> Tensor:
            simple, positive = (x.flatten() for x in split()[level])
            if name in self.all_rows:
                return simple
            if level not in chosen:  # to choose by a mask waits for the device
                chosen[level] = simple[positive]
            return chosen[level]

        own.rows = rows
        with wrapped(self.head, 'loss_by_feat_single', count):
            yield

    all_rows: tuple[str, ...] = ('loss_cls',)
    """Loss modules that see all units; the others see the positive ones."""


class Retina(DenseFamily):
    """RetinaNet: anchors, deltas."""

    kind = RetinaHead
    all_rows = ('loss_cls', 'loss_bbox')


class ATSS(DenseFamily):
    """ATSS: one anchor, deltas, decoded targets."""

    kind = ATSSHead
    first = 1


class GFL(DenseFamily):
    """GFL: one anchor, distributions over the distances of the sides, quality targets."""

    kind = GFLHead
    first = 1
    targets_are_boxes = True

    def box_channels(self) -> int:
        """Four sides, ``reg_max + 1`` distances."""
        return 4 * (self.head.reg_max + 1)

    def distribution(self, predicted: Tensor) -> Tensor:
        """``(P, 4, reg_max + 1)``."""
        return predicted.view(len(predicted), 4, self.head.reg_max + 1)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Expected distances from the anchor's centre."""
        with torch.autocast(predicted.device.type, enabled=False):  # it ends in a linear layer
            distances = self.head.integral(predicted) * strides[:, None]
        return distance2bbox(self.head.anchor_center(priors), distances)


class RTMDet(DenseFamily):
    """RTMDet: points, distances, quality targets."""

    kind = RTMDetHead
    first = 1
    targets_are_boxes = True

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Distances from the point, in pixels."""
        return distance2bbox(priors[:, :2], predicted)


class FCOS(DenseFamily):
    """FCOS: points, distances, in strides while training if ``norm_on_bbox``; no weights."""

    kind = FCOSHead

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Distances from the point."""
        if self.head.norm_on_bbox and self.head.training:
            predicted = predicted * strides[:, None]
        return super().decode(priors, strides, predicted)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """They are in strides in eval mode too."""
        if self.head.norm_on_bbox:
            targets = targets * strides[:, None]
        return DenseFamily.decode(self, priors, strides, targets)

    def assigned(self, calls: list[Call], levels: Levels) -> Assigned:
        """Levels of images one after the other; every point has a label."""
        labels, boxes = calls[-1].output[:2]
        labels = torch.cat([x.view(-1, n) for x, n in zip(labels, levels.sizes, strict=True)], 1)
        boxes = torch.cat([x.view(-1, n, 4) for x, n in zip(boxes, levels.sizes, strict=True)], 1)
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, boxes, every)

    @contextmanager
    def rows(self, own: OwnLoss, split: LevelRows) -> Iterator[None]:
        """All levels at once."""

        def rows(name: str) -> Tensor:
            simple, positive = (
                torch.cat([part.flatten() for part in parts])
                for parts in zip(*split(), strict=True)
            )
            return simple if name in self.all_rows else simple[positive]

        own.rows = rows
        yield


class YOLOX(DenseFamily):
    """YOLOX: points, centre and log size; only positive units have a class, the rest has none."""

    kind = YOLOXHead
    targets = '_get_targets_single'
    targets_are_boxes = True
    knows_background = False
    all_rows = ('loss_obj',)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """As the head does it."""
        points = torch.cat((priors[:, :2], strides[:, None].expand(-1, 2)), 1)
        return self.head._bbox_decode(points, predicted[None])[0]

    def assigned(self, calls: list[Call], levels: Levels) -> Assigned:
        """One call per image, with the class and the box of its positive points."""
        positive = torch.stack([call.output[0] for call in calls])
        classes, boxes = (torch.cat([call.output[place] for call in calls]) for place in (1, 3))
        labels = positive.new_full(positive.shape, self.head.num_classes, dtype=torch.long)
        labels[positive] = classes.argmax(1)
        targets = boxes.new_zeros(*positive.shape, 4)
        targets[positive] = boxes
        known = positive.index_put((positive,), classes.sum(1) > 0)  # targets are times the IoU
        return Assigned(labels, torch.ones_like(positive), targets, known)

    def confidence(self, outputs: Sequence[Sequence[Tensor]], scores: Tensor) -> Tensor:
        """Of the class times that there is an object: the class alone means nothing elsewhere."""
        return super().confidence(outputs, scores) * self.flatten(outputs[2], 1).sigmoid()

    @contextmanager
    def rows(self, own: OwnLoss, split: LevelRows) -> Iterator[None]:
        """All levels at once, images one after the other."""

        def rows(name: str) -> Tensor:
            simple, positive = (
                torch.cat(parts, 1).flatten() for parts in zip(*split(), strict=True)
            )
            return simple if name in self.all_rows else simple[positive]

        own.rows = rows
        yield


OWN_LOSS = ('get_targets', '_get_targets_single', 'loss_by_feat', 'loss_by_feat_single')
FAMILIES = (RTMDet, GFL, ATSS, FCOS, YOLOX, Retina)


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
