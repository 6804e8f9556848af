"""How box heads of two-stage detectors encode classes and boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from mmdet.models.losses import SeesawLoss
from mmdet.models.roi_heads.bbox_heads import BBoxHead, SABLHead
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.units.by_class import ByClass


class BoxHeadFamily:
    """Reads the classes and boxes of one kind of box head (SEL-7, FIT-4).

    This class fits a head with one softmax over the classes and background as the last, and with
    deltas of the RoI. Subclasses override what differs.

    Args:
        head: The box head.
    """

    loss_methods: ClassVar[tuple[str, ...]] = ('get_targets', 'loss_and_target', 'loss')
    """Methods that a subclass of the registered class must not override."""
    all_rows: ClassVar[tuple[str, ...]] = ('loss_cls',)
    """Loss modules with a row for every RoI; the others have rows for positive RoIs only."""

    def __init__(self, head: nn.Module) -> None:
        self.head: Any = head

    @property
    def has_boxes(self) -> bool:
        """The head predicts boxes besides classes."""
        return self.head.with_reg

    @property
    def classes_problem(self) -> str:
        """What the head predicts that is no softmax over classes; empty where all is well."""
        loss = self.head.loss_cls
        if not getattr(self.head, 'with_cls', True):
            return 'no classes'
        custom = getattr(loss, 'custom_cls_channels', False)
        if getattr(loss, 'use_sigmoid', False) or (custom and CLASS_LOGITS.find(loss) is None):
            return type(loss).__name__
        return ''

    def logits(self, scores: Tensor) -> Tensor:
        """Logits ``(n, C + 1)`` of one softmax, background as the last, from the head's scores."""
        convert = CLASS_LOGITS.find(self.head.loss_cls)
        return convert(scores) if convert else scores

    def decode(self, priors: Tensor, predicted: Any, rois: Tensor, classes: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` of some RoIs.

        Args:
            priors: Corners of all RoIs, ``(n, 4)``.
            predicted: What the head predicts for all RoIs.
            rois: Indices of the RoIs, ``(K,)``.
            classes: The class of each, ``(K,)``.
        """
        if self.head.reg_class_agnostic:
            deltas = predicted[rois]
        else:
            deltas = predicted.unflatten(1, (self.head.num_classes, -1))[rois, classes]
        # In full precision under AMP too: in half precision boxes are off by pixels.
        priors = full_precision(priors[rois])
        return get_box_tensor(self.head.bbox_coder.decode(priors, full_precision(deltas)))


BOX_HEADS: ByClass[type[BoxHeadFamily]] = ByClass()
"""Class of a box head -> its family. A family outside of this package is registered in the same
way, in a module that the config names under ``custom_imports``."""
CLASS_LOGITS: ByClass[Callable[[Tensor], Tensor]] = ByClass()
"""Class of a classification loss with channels of its own -> what turns scores ``(n, ...)`` into
the logits ``(n, C + 1)`` of one softmax with the same probabilities."""

BOX_HEADS.register(BBoxHead)(BoxHeadFamily)


@BOX_HEADS.register(SABLHead)
class SABL(BoxHeadFamily):
    """Side-Aware Boundary Localization (https://arxiv.org/abs/1912.04260): sides in buckets."""

    all_rows = ('loss_cls', 'loss_bbox_cls', 'loss_bbox_reg')
    has_boxes = True

    def decode(self, priors: Tensor, predicted: Any, rois: Tensor, classes: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` of some RoIs: the likeliest bucket of each side, and the offset there.

        The gradient reaches the offsets; which bucket is the likeliest has none.
        """
        parts = [full_precision(part[rois]) for part in predicted]
        return self.head.bbox_coder.decode(full_precision(priors[rois]), parts)[0]


@CLASS_LOGITS.register(SeesawLoss)
def seesaw_logits(scores: Tensor) -> Tensor:
    """Seesaw loss (https://arxiv.org/abs/2008.10032): a softmax over classes, times objectness.

    Args:
        scores: ``(n, C + 2)``, the classes, then object and background.
    """
    scores = full_precision(scores)
    classes, objectness = scores[..., :-2].log_softmax(-1), scores[..., -2:].log_softmax(-1)
    return torch.cat((classes + objectness[..., :1], objectness[..., 1:]), -1)
