"""YOLOv3 (https://arxiv.org/abs/1804.02767)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import YOLOV3Head
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, wrapped
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily, SplitLevels
from mmdistill_ext.units.painters import Levels
from mmdistill_ext.units.split.own_loss import OwnLoss

BOX = 4
"""Channels of an anchor before its objectness, after which its classes follow."""


@DENSE_FAMILIES.register(YOLOV3Head)
class YOLOv3(DenseFamily):
    """Three anchors per location; centre and log size, an objectness, and classes.

    A unit's scores are those that the head predicts with: class times objectness. So the classes
    and the objectness of an anchor are compared and distilled as one, on background anchors too.
    Anchors that overlap an object without being assigned to it are ignored.
    """

    @property
    def sigmoid(self) -> bool:
        """The classes are independent sigmoids."""
        return True

    @property
    def score_channels(self) -> int:
        """One score per class."""
        return self.num_classes

    def outputs(self, predicted: Sequence) -> Sequence[Sequence[Tensor]]:
        """Scores of class times objectness, as logits, and box predictions of each level."""
        scores, boxes = [], []
        for level in predicted[0]:
            anchors = level.unflatten(1, (-1, self.head.num_attrib))
            boxes.append(anchors[:, :, :BOX].flatten(1, 2))
            objectness, classes = full_precision(anchors[:, :, BOX:]).split(
                [1, self.num_classes], dim=2
            )
            scores.append(logit_of_product(classes, objectness).flatten(1, 2))
        return scores, boxes

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from the centre's place in its cell, a sigmoid, and the log size."""
        predicted = torch.cat((predicted[:, :2].sigmoid(), predicted[:, 2:]), 1)
        return self.head.bbox_coder.decode(priors, predicted, strides[:, None])

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from targets, which have the centre's place itself."""
        return self.head.bbox_coder.decode(priors, targets, strides[:, None])

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: what every anchor should predict, and which are background."""
        targets, background = (torch.cat(list(part), 1) for part in calls[-1].output)
        positive = targets[..., BOX] > 0
        labels = targets[..., BOX + 1 :].argmax(-1).where(positive, self.num_classes)
        valid = positive | (background > 0)
        return Assigned(labels, valid, targets[..., :BOX], valid)

    @contextmanager
    def tell_rows(self, own: OwnLoss, split: SplitLevels) -> Iterator[None]:
        """Tell the rows of each level: every loss module has one for every anchor, by image."""
        level = -1

        def count(single: Callable) -> Callable:
            def counting(*args: Any, **kwargs: Any) -> Any:
                nonlocal level
                level += 1
                return single(*args, **kwargs)

            return counting

        own.row_mask = lambda name: split()[level][0]
        with wrapped(self.head, 'loss_by_feat_single', count):
            yield


def logit_of_product(first: Tensor, second: Tensor) -> Tensor:
    """Logit of ``sigmoid(first) * sigmoid(second)``, without overflow."""
    return first + second - torch.logaddexp(torch.logaddexp(first, second), torch.zeros_like(first))
