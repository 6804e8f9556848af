"""Units of mask heads: the pixels of positive RoIs (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from torch import Tensor, nn

from mmdistill_ext.functional.fit import is_simple
from mmdistill_ext.functional.logits.selective import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import SplitRule, Units
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.roi.head import RoIHeadPair
from mmdistill_ext.units.split.head_split import HeadSplit

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample


class MaskPair(RoIHeadPair):
    """Pairs mask heads, pixel by pixel of the positive RoIs, in the mask of the assigned class.

    As in a binary segmenter a pixel is inside or outside. FIT splits by pixel, or by image: by the
    share of its pixels, over all RoIs, that the teacher gets right, as for a segmenter.
    """

    kind = FCNMaskHead
    output = 'loss_mask'
    background = False
    box_distances = ()
    sigmoid = True
    predicts = False
    num_classes = 2

    @property
    def data_classes(self) -> int:
        """Number of classes of the data."""
        return self.head.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels."""
        return ('outside', 'inside')

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: SplitRule | None = None,
        own: MaskSplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        found = self.known(own) or MaskStep(self, taps, teacher_call)
        return Units(
            student=found.of_class(self.head, found.call['mask_preds']),
            teacher=found.teacher,
            labels=found.labels,
            ignore_index=IGNORED,
            sigmoid=True,
            paint=BoxRegions(
                size_of(data_samples), len(data_samples), (found.images,), found.rois[:, 1:]
            ),
            split=split,
            simple=own.simple if own else None,
            own=own.result(self.own_losses(taps[self.student_tap])) if own else None,
        )

    @contextmanager
    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: SplitRule
    ) -> Iterator[MaskSplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""
        own = MaskSplit(MaskStep(self, taps, teacher_call), len(data_samples), split)
        with own.loss():
            yield own


class MaskStep:
    """What is known of one step, worked out when it is first asked for; of ``P`` positive RoIs."""

    def __init__(self, pair: MaskPair, taps: Taps, teacher_call: Call) -> None:
        self.pair, self.taps, self.features = pair, taps, teacher_call.output

    @cached_property
    def call(self) -> dict:
        """What the student's head was called with."""
        return self.taps[self.pair.student_tap].kwargs

    @cached_property
    def rois(self) -> Tensor:
        """``(P, 5)``."""
        results = self.call['sampling_results']
        return bbox2roi([get_box_tensor(result.pos_priors) for result in results])

    @cached_property
    def images(self) -> Tensor:
        """``(P,)``."""
        return self.rois[:, 0].long()

    @cached_property
    def labels(self) -> Tensor:
        """``(P, h, w)``, 1 inside."""
        return self.taps[self.pair.targets_tap].output.round().long()

    @cached_property
    def teacher(self) -> Tensor:
        """Logits ``(P, 1, h, w)``, at the teacher's size."""
        masks = self.pair.teacher.run('_mask_forward', self.features, self.rois)['mask_preds']
        return self.of_class(self.pair.teacher.head, masks)

    def of_class(self, head: nn.Module, masks: Tensor) -> Tensor:
        """Those of the assigned classes, ``(P, 1, h, w)``."""
        results = self.call['sampling_results']
        classes = torch.cat([result.pos_gt_labels for result in results])
        if head.class_agnostic:
            classes = torch.zeros_like(classes)
        return masks[torch.arange(len(masks), device=masks.device), classes].unsqueeze(1)


class MaskSplit(HeadSplit):
    """The split of a mask head's own loss."""

    def __init__(self, pairing: MaskStep, images: int, split: SplitRule) -> None:
        super().__init__(pairing.taps.owner(pairing.pair.student_tap), split, images)
        self.pairing = pairing
        self.loss.rows = lambda name: self.simple

    @property
    def valid(self) -> Tensor:
        """``(P, h, w)`` bool: all."""
        return torch.ones_like(self.pairing.labels, dtype=torch.bool)

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """``(P, h, w)`` or ``(B,)``, what the teacher has right."""
        labels, images = self.pairing.labels, self.pairing.images
        logits = full_precision(self.pairing.teacher)
        if len(labels) and logits.shape[2:] != labels.shape[1:]:
            logits = nn.functional.interpolate(logits, labels.shape[1:], mode='bilinear')
        right = (logits.squeeze(1) > 0) == (labels == 1)
        if self.split.by == 'unit':
            return right
        pixels = torch.stack((right.sum((1, 2)), self.valid.sum((1, 2))))
        right, pixels = pixels.new_zeros(2, self.images).index_add(1, images, pixels)
        return is_simple(right, pixels, self.split.threshold)

    @cached_property
    def simple(self) -> Tensor:
        """``(P, h, w)`` bool."""
        if self.split.by == 'unit':
            return self.right
        return self.right[self.pairing.images][:, None, None].expand(self.valid.shape)
