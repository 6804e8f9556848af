"""Units of two-stage detectors: sampled proposals, and the pixels of their masks (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.functional.selective import full_precision
from mmdistill_ext.losses.box import overlaps
from mmdistill_ext.taps import Call, Taps, resolve
from mmdistill_ext.units.base import Boxes, OwnSplit, Split, Units
from mmdistill_ext.units.detection import IGNORED, DetectionUnits, ground_truth, size_of
from mmdistill_ext.units.maps import BoxRegions
from mmdistill_ext.units.own_loss import OwnLoss
from mmdistill_ext.units.rightness import right_images, right_units

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample

RUNS = ('_bbox_forward', '_mask_forward')
"""Methods of a RoI head that run its parts on given RoIs."""
TRAINS = (*RUNS, 'loss', 'bbox_loss', 'predict')
"""Those that a student's should have from Faster or Cascade R-CNN. Others sample by rules of their
own or change them while they train (PISA, Dynamic R-CNN), or see each image several times (Trident,
whose `predict` tells).
"""


class RoIHead:
    """A box or mask head of a detector's RoI head, and how to run it on given RoIs.

    Args:
        model: A two-stage detector.
        path: ``'roi_head.bbox_head'``, ``'roi_head.mask_head'``; ``'roi_head.bbox_head.0'`` for
            the first stage of a cascade.
        kind: What the head should be.
        key: The config key to name in errors.
        methods: Those of the RoI head that should be mmdet's plain ones.

    Raises:
        ValueError: The path leads to no such head.
    """

    def __init__(
        self, model: nn.Module, path: str, kind: type, key: str, methods: Sequence[str] = RUNS
    ) -> None:
        self.head, _ = resolve(model, path, key)
        if isinstance(self.head, nn.ModuleList):
            stages = ', '.join(f"'{path}.{stage}'" for stage in range(len(self.head)))
            raise ValueError(
                f"`{key}` should name one stage of a cascade: {stages}. Found '{path}'."
            )
        self.roi_head = getattr(model, 'roi_head', None)
        known = any(
            all(getattr(type(self.roi_head), m, None) is getattr(base, m) for m in methods)
            for base in (StandardRoIHead, CascadeRoIHead)
        )
        own = all(
            getattr(type(self.head), name, None) is getattr(kind, name, None)
            for name in ('get_targets', 'loss_and_target', 'loss')
        )
        if not (known and isinstance(self.head, kind) and own):
            raise ValueError(
                f'`{key}` should lead to a {kind.__name__} in the RoI head of Faster, Mask or '
                f"Cascade R-CNN. Found '{path}', a {type(self.head).__name__} in a "
                f'{type(self.roi_head).__name__}.'
            )
        last = path.rsplit('.', 1)[-1]
        self.stage = (int(last),) if last.isdigit() else ()
        self.loss_weight = self.roi_head.stage_loss_weights[self.stage[0]] if self.stage else 1.0

    @property
    def is_last(self) -> bool:
        """The detector predicts with this stage."""
        return not self.stage or self.stage[0] == self.roi_head.num_stages - 1

    @torch.no_grad()
    def run(self, method: str, features: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor]:
        """Run it on RoIs ``(n, 5)``."""
        return getattr(self.roi_head, method)(*self.stage, features, rois)


class _RoIUnits(DetectionUnits):
    """What box and mask heads share.

    Args:
        student: The student, an mmdet two-stage detector.
        teacher: The teacher.
        head: Path of the student's head.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    kind: type
    output: str  # where `loss_and_target` puts the losses
    teacher_tap = 'extract_feat'

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = RoIHead(student, head, self.kind, f'{key}.head', TRAINS)
        self.teacher = RoIHead(teacher, teacher_head, self.kind, f'{key}.teacher_head')
        self.head = self.student.head
        own, other = self.head.num_classes, self.teacher.head.num_classes
        if own != other:
            raise ValueError(
                f'Student and teacher should have the same `num_classes` (`{key}`). Found {own} in '
                f"the student's '{head}', {other} in the teacher's '{teacher_head}'."
            )
        self.heads = head, teacher_head
        self.student_tap = f'{head}.loss_and_target'
        self.targets_tap = f'{head}.get_targets'
        self.student_taps = (self.student_tap, self.targets_tap)
        self.prefix = head.removeprefix('roi_head.').replace('_head', '').replace('.', '_')

    @property
    def label_kinds(self) -> str:
        """What labels the student's losses need."""
        return 'boxes and masks' if self.student.roi_head.with_mask else 'boxes'

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has what :meth:`gt_loss` needs."""
        instances = sample['data_samples'].get('gt_instances', {})
        masks = 'masks' in instances or not self.student.roi_head.with_mask
        return masks and super().has_labels(sample)

    def own_losses(self, call: Call) -> dict[str, Tensor]:
        """The head's losses, times the stage's weight, from the call of :attr:`student_tap`."""
        losses = call.output[self.output].items()
        return {name: self.student.loss_weight * x for name, x in losses if 'loss' in name}


class RoIUnits(_RoIUnits):
    """Pairs box heads on the proposals that the student sampled for its own loss.

    The teacher's RoI head looks at the same boxes in the teacher's features. Images with fewer
    samples than others are filled up with ignored units.
    """

    kind = BBoxHead
    output = 'loss_bbox'
    sigmoid = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        super().__init__(student, teacher, head, teacher_head, key)
        self.predicts = self.student.is_last
        for side, found in (('student', self.student.head), ('teacher', self.teacher.head)):
            loss = found.loss_cls
            if getattr(loss, 'use_sigmoid', False) or found.custom_cls_channels:
                raise ValueError(
                    f"The {side}'s box head should have one softmax over classes and background "
                    f'(`{key}`). Found {type(loss).__name__}.'
                )
            if not (found.with_cls and found.with_reg):
                raise ValueError(
                    f"The {side}'s box head should predict classes and boxes (`{key}`). Found "
                    f'with_cls={found.with_cls}, with_reg={found.with_reg}.'
                )

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: Split | None = None,
        own: RoISplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        known = own is not None and own.pairing.pair is self  # or another head of the teacher
        found = own.pairing if known else RoIPairing(self, taps, teacher_call)
        call = found.call
        boxes = found.boxes(self.student, call['bbox_pred'], found.positive, found.classes)
        return Units(
            student=found.pad(call['cls_score']).transpose(1, 2),
            teacher=found.pad(found.teacher['cls_score']).transpose(1, 2),
            labels=found.labels,
            ignore_index=IGNORED,
            sigmoid=False,
            boxes=Boxes(
                index=found.index,
                student=boxes,
                teacher=found.teacher_boxes,
                target=found.target_boxes,
                scale=found.scale,
            ),
            paint=BoxRegions(
                size_of(data_samples), len(data_samples), found.index, found.target_boxes
            ),
            split=split,
            simple=own.simple if own else None,
            own=own.result(self.own_losses(taps[self.student_tap])) if own else None,
        )

    @contextmanager
    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: Split
    ) -> Iterator[RoISplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""
        pairing = RoIPairing(self, taps, teacher_call)
        own = RoISplit(pairing, ground_truth(data_samples), split)
        with own.loss():
            yield own


class RoIPairing:
    """What is known of one step, worked out when it is first asked for.

    ``n`` RoIs lie one image after the other; units are ``(B, N)``, ``N`` the most of any image.
    """

    def __init__(self, pair: RoIUnits, taps: Taps, teacher_call: Call) -> None:
        self.pair, self.taps, self.features = pair, taps, teacher_call.output

    @cached_property
    def call(self) -> dict:
        """What the student's head was called with."""
        return self.taps[self.pair.student_tap].kwargs

    @cached_property
    def counts(self) -> list[int]:
        """RoIs of each image."""
        return [len(result.priors) for result in self.call['sampling_results']]

    @cached_property
    def teacher(self) -> dict[str, Tensor]:
        """The teacher's scores ``(n, C + 1)`` and box predictions."""
        return self.pair.teacher.run('_bbox_forward', self.features, self.call['rois'])

    @cached_property
    def flat_labels(self) -> Tensor:
        """``(n,)``, the number of classes for background."""
        return self.taps[self.pair.targets_tap].output[0]

    @cached_property
    def labels(self) -> Tensor:
        """``(B, N)``."""
        valid = self.taps[self.pair.targets_tap].output[1] > 0
        return self.pad(self.flat_labels.where(valid, IGNORED), IGNORED)

    @cached_property
    def positive(self) -> Tensor:
        """The RoIs of an object, ``(P,)``."""
        labels = self.flat_labels
        return ((labels >= 0) & (labels < self.pair.num_classes)).nonzero().squeeze(1)

    @cached_property
    def classes(self) -> Tensor:
        """Of these, ``(P,)``."""
        return self.flat_labels[self.positive]

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and unit of these."""
        return self.place(self.positive)

    @cached_property
    def target_boxes(self) -> Tensor:
        """Of these, ``(P, 4)``."""
        results = self.call['sampling_results']
        return torch.cat([get_box_tensor(result.pos_gt_bboxes) for result in results])

    @cached_property
    def scale(self) -> Tensor:
        """Side of the RoI in pixels, ``(P,)``."""
        rois = self.call['rois'][self.positive, 1:]
        return (rois[:, 2:] - rois[:, :2]).clamp(min=1).prod(1).sqrt()

    @cached_property
    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes of the positive RoIs, of the assigned classes, ``(P, 4)``."""
        predicted = self.teacher['bbox_pred']
        return self.boxes(self.pair.teacher, predicted, self.positive, self.classes)

    def place(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Image and unit of RoIs ``(K,)``."""
        images = self.call['rois'][rois, 0].long()
        starts = images.new_tensor([0, *self.counts]).cumsum(0)
        return images, rois - starts[images]

    def pad(self, flat: Tensor, value: float = 0) -> Tensor:
        """``(n, ...)`` -> ``(B, N, ...)``."""
        return pad_sequence(flat.split(self.counts), batch_first=True, padding_value=value)

    def boxes(self, side: RoIHead, predicted: Tensor, rois: Tensor, classes: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` of RoIs ``(K,)``, for classes ``(K,)``."""
        head = side.head
        if head.reg_class_agnostic:
            deltas = predicted[rois]
        else:
            deltas = predicted.unflatten(1, (head.num_classes, -1))[rois, classes]
        # In full precision under AMP too: half of it is pixels off.
        priors = full_precision(self.call['rois'][rois, 1:])
        return get_box_tensor(head.bbox_coder.decode(priors, full_precision(deltas)))


class RoISplit:
    """The split of a box head's own loss (FIT-3, FIT-4), decided once its targets are known."""

    def __init__(self, pairing: RoIPairing, truth: list, split: Split) -> None:
        self.pairing, self.truth, self.split = pairing, truth, split
        self.loss = OwnLoss(pairing.pair.head, split.hard_weight)
        self.loss.rows = self._rows

    def _rows(self, name: str) -> Tensor | None:
        found = self.pairing
        if not found.taps.all(found.pair.targets_tap):  # OHEM asks for losses to choose the RoIs by
            return None
        every = torch.arange(len(found.flat_labels), device=found.flat_labels.device)
        flat = self.simple[found.place(every)]
        return flat if name == 'loss_cls' else flat[found.positive]

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """``(B, N)`` or ``(B,)``, what the teacher has right."""
        found, split = self.pairing, self.split
        scores = found.pad(full_precision(found.teacher['cls_score']).softmax(-1))
        labels, limits = found.labels, (split.iou, split.score)
        if split.by == 'unit':
            ious = overlaps(found.teacher_boxes, found.target_boxes)
            right = right_units(scores, labels, found.pair.num_classes, found.index, ious, *limits)
            return right & (labels != IGNORED)
        starts = [0, *torch.tensor(found.counts).cumsum(0).tolist()]

        def boxes_of(image: int, units: Tensor, classes: Tensor) -> Tensor:
            rois = units + starts[image]
            return found.boxes(found.pair.teacher, found.teacher['bbox_pred'], rois, classes)

        valid = labels != IGNORED
        scores = scores[..., : found.pair.num_classes]
        return right_images(scores, labels, valid, boxes_of, self.truth, *limits)

    @cached_property
    def simple(self) -> Tensor:
        """``(B, N)`` bool."""
        if self.split.by == 'unit':
            return self.right
        return self.right[:, None].expand(self.pairing.labels.shape)

    def result(self, losses: dict) -> OwnSplit:
        """What came out, given the head's losses."""
        valid = self.pairing.labels != IGNORED
        if self.split.by == 'image':
            valid = torch.ones_like(self.right)
        samples = torch.stack((self.right.sum(), valid.sum()))
        return OwnSplit(samples, self.loss.parts(losses), len(self.truth))


class RoIMaskUnits(_RoIUnits):
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
        split: Split | None = None,
        own: MaskSplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        known = own is not None and own.pairing.pair is self  # or another head of the teacher
        found = own.pairing if known else MaskPairing(self, taps, teacher_call)
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
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: Split
    ) -> Iterator[MaskSplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""
        own = MaskSplit(MaskPairing(self, taps, teacher_call), len(data_samples), split)
        with own.loss():
            yield own


class MaskPairing:
    """What is known of one step, worked out when it is first asked for; of ``P`` positive RoIs."""

    def __init__(self, pair: RoIMaskUnits, taps: Taps, teacher_call: Call) -> None:
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


class MaskSplit:
    """The split of a mask head's own loss (FIT-3, FIT-4), decided once its targets are known."""

    def __init__(self, pairing: MaskPairing, images: int, split: Split) -> None:
        self.pairing, self.images, self.split = pairing, images, split
        self.loss = OwnLoss(pairing.pair.head, split.hard_weight)
        self.loss.rows = lambda name: self.simple

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """``(P, h, w)`` bool, pixels that the teacher has right."""
        labels = self.pairing.labels
        logits = full_precision(self.pairing.teacher)
        if len(labels) and logits.shape[2:] != labels.shape[1:]:
            logits = nn.functional.interpolate(logits, labels.shape[1:], mode='bilinear')
        return (logits.squeeze(1) > 0) == (labels == 1)

    @cached_property
    @torch.no_grad()
    def counts(self) -> Tensor:
        """``(2, images)``: right pixels, and all."""
        pixels = torch.stack((self.right.sum((1, 2)), torch.ones_like(self.right).sum((1, 2))))
        return pixels.new_zeros(2, self.images).index_add(1, self.pairing.images, pixels)

    @cached_property
    def simple(self) -> Tensor:
        """``(P, h, w)`` bool."""
        if self.split.by == 'unit':
            return self.right
        right, pixels = self.counts
        images = right >= self.split.threshold * pixels
        return images[self.pairing.images][:, None, None].expand(self.right.shape)

    def result(self, losses: dict) -> OwnSplit:
        """What came out, given the head's losses."""
        right, pixels = self.counts
        if self.split.by == 'image':
            right, pixels = (right >= self.split.threshold * pixels), torch.ones_like(pixels)
        samples = torch.stack((right.sum(), pixels.sum()))
        return OwnSplit(samples, self.loss.parts(losses), self.images)
