"""Units of a segmentation head: pixels (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.segmentors import BaseSegmentor
from mmseg.structures import SegDataSample
from torch import Tensor

from mmdistill_ext.functional.checks import given
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from mmdistill_ext.units.pair import HeadPair
from mmdistill_ext.units.pixel.activation import conversion
from mmdistill_ext.units.pixel.head import MAIN, FoundHead, check_logits, find_head
from mmdistill_ext.units.pixel.head_logits import HeadLogits
from mmdistill_ext.units.pixel.points import paint_points, sample_labels, sample_map
from mmdistill_ext.units.split.head_split import HeadSplit


class PixelPair(HeadPair):
    """Pairs a head of the student with a head of the teacher, pixel by pixel.

    The student's logits are those that its own loss is formed of, taken while it computes that
    loss; the teacher's those that it predicts with
    (:class:`~mmdistill_ext.units.pixel.head_logits.HeadLogits` says which these are). Both stay at
    the heads' stride, which may differ; the labels are those of the batch, at full size. A
    student's head that sees only points in training (PointRend) has these points as units: labels
    and the teacher's logits are sampled there.

    Args:
        student: The student, an mmseg segmentor.
        teacher: The teacher, an mmseg segmentor.
        head: Path of the student's head, such as ``'decode_head'``, ``'auxiliary_head.0'``. Of a
            list the last decode head is meant, which predicts, or the first auxiliary one.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, a head has no per-pixel logits, or the heads differ in
            classes, or in what they predict with and there is no exact conversion.

    Attributes:
        student_head: The student's head, and how it is read.
        other_head: The teacher's.
        convert: Turns the teacher's logits into such as the student's.
    """

    label_kinds = 'gt_sem_seg'

    def __init__(
        self, student: BaseSegmentor, teacher: BaseSegmentor, head: str, teacher_head: str, key: str
    ) -> None:
        mine = find_head(student, head, f'{key}.head')
        other = find_head(teacher, teacher_head, f'{key}.teacher_head')
        self.student_head, self.other_head = mine, other
        self.logits, self.teacher_logits = mine.logits, other.logits
        self.head, self.teacher_head = mine.logits.head, other.logits.head
        self.convert = _conversion(mine, other, key)
        self.sigmoid = mine.logits.sigmoid
        self.predicts = self.head is find_head(student, MAIN, key).logits.head
        self.heads = mine.path, other.path
        self.student_tap, self.teacher_tap = mine.loss, other.output
        self.student_taps = (self.student_tap,)
        short = mine.path.replace('_head', '').replace('auxiliary', 'aux')
        self.prefix = short.replace('.', '_')

    @property
    def num_classes(self) -> int:
        """Number of label classes, 2 for a binary head."""
        return self.logits.num_labels

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set."""
        return self.logits.num_labels

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels; of a binary head whose data names one class, label 0 is the rest."""
        return ('background', *classes) if len(classes) < self.num_classes == 2 else classes

    @property
    def ignore_index(self) -> int:
        """Label of pixels that are ignored; one that no pixel has if the head ignores none."""
        return self.logits.ignore_index

    def fused_loss(self, key: str) -> FusedCrossEntropy:
        """The head's own loss, which the block-wise pass forms in place of the head.

        Args:
            key: The config key that asks for it, to name in errors.

        Raises:
            ValueError: The head's loss is not one plain softmax cross-entropy.
        """
        obstacle = _obstacle(self.logits)
        if obstacle:
            raise ValueError(
                f'`{key}` needs a head whose loss is one softmax CrossEntropyLoss with '
                f"reduction='mean' and no pixel sampler. Found a {type(self.head).__name__} with "
                f'{obstacle}: without `{key}` it can be distilled.'
            )
        (loss,) = self.logits.losses
        weight = loss.class_weight
        return FusedCrossEntropy(
            name=loss.loss_name,
            loss_weight=loss.loss_weight,
            class_weight=None if weight is None else tuple(float(w) for w in weight),
            avg_non_ignore=loss.avg_non_ignore,
        )

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[SegDataSample],
        split: SplitRule | None = None,
        own: HeadSplit | None = None,
    ) -> Units:
        """Build the units of one step, one pixel of the labels or one point each (SEL-1)."""
        call = taps[self.student_tap]
        points = self.logits.points(call)
        student = self.logits.of_loss(call)
        check_logits(student, self.student_tap, 4 if points is None else 3)
        teacher = check_logits(self.teacher_logits.of_output(teacher_call), self.teacher_tap)
        teacher = self.convert(teacher)
        labels = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples])
        paint = None
        if points is not None:
            paint = partial(paint_points, points, labels.shape[1:])
            teacher = sample_map(teacher, points, self.teacher_head.align_corners)
            labels = sample_labels(labels, points, self.head.align_corners)
        return Units(
            student=student,
            teacher=teacher,
            labels=labels,
            ignore_index=self.ignore_index,
            sigmoid=self.sigmoid,
            student_align_corners=self.head.align_corners,
            teacher_align_corners=self.teacher_head.align_corners,
            split=split,
            paint=paint,
        )

    @staticmethod
    def has_labels(sample: dict) -> bool:
        """Whether a sample of a data set has the label map that :meth:`gt_loss` needs."""
        return 'gt_sem_seg' in sample['data_samples']

    @torch.no_grad()
    def gt_loss(
        self, student: BaseSegmentor, batch: dict, fused: FusedCrossEntropy | None = None
    ) -> Tensor:
        """The head's own loss on a batch of a loader, in the student's present mode (FIT-1).

        The student predicts as in validation (sliding windows included); images may differ in
        size, and padding is cut off before they are compared with their labels.

        Args:
            student: The student; the head should be the one that it predicts with.
            batch: What the loader gives, with labels.
            fused: The head's loss, which has to be given.

        Returns:
            ``(2,)``: the sum over the pixels that are not ignored, and the sum of their weights.
        """
        batch = student.data_preprocessor(batch, False)
        samples = batch['data_samples']
        logits = student.inference(batch['inputs'], [sample.metainfo for sample in samples])
        classes = given(fused, 'fused').class_weight
        weight = None if classes is None else logits.new_tensor(classes).float()
        total = logits.new_zeros(2, dtype=torch.float32)
        for image, sample in zip(logits, samples, strict=True):
            label = sample.gt_sem_seg.data.long()
            image = _without_padding(image, sample.metainfo)[None].float()
            if image.shape[2:] != label.shape[1:]:
                image = F.interpolate(
                    image, label.shape[1:], mode='bilinear', align_corners=self.head.align_corners
                )
            ignored = self.ignore_index
            valid = label[label != ignored]
            total[0] += F.cross_entropy(image, label, weight, ignore_index=ignored, reduction='sum')
            total[1] += valid.numel() if weight is None else weight[valid].sum()
        return total


def _without_padding(image: Tensor, meta: dict) -> Tensor:
    padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    left, right, top, bottom = padding
    height, width = image.shape[1:]
    return image[:, top : height - bottom, left : width - right]


def _conversion(mine: FoundHead, other: FoundHead, key: str) -> Callable[[Tensor], Tensor]:
    """How the teacher's logits become such as the student's."""
    labels = mine.logits.num_labels, other.logits.num_labels
    if labels[0] != labels[1]:
        raise ValueError(
            f'`num_classes` should be the same for student and teacher (`{key}`). Found '
            f"{labels[0]} in the student's '{mine.path}', {labels[1]} in the teacher's "
            f"'{other.path}'."
        )
    source, target = other.logits.activation, mine.logits.activation
    convert = conversion(source, target)
    if convert is None:
        raise ValueError(
            f'`{key}` should have heads that predict with the same activation, or a teacher with '
            f'a softmax: several sigmoids are no distribution over the classes. Found {target} in '
            f"the student's '{mine.path}', {source} in the teacher's '{other.path}'; a loss of "
            "features (`tap='backbone'`) fits both."
        )
    return convert


def _obstacle(logits: HeadLogits) -> str | None:
    """Why the block-wise pass cannot form the head's own loss; None if it can."""
    if type(logits.head).loss_by_feat is not BaseDecodeHead.loss_by_feat:
        return 'a `loss_by_feat` of its own'
    if logits.head.sampler is not None:
        return f'a sampler, {type(logits.head.sampler).__name__}'
    if len(logits.losses) != 1 or type(logits.losses[0]) is not CrossEntropyLoss:
        return f'[{", ".join(type(loss).__name__ for loss in logits.losses)}]'
    (loss,) = logits.losses
    if logits.sigmoid or loss.use_mask:
        return 'a sigmoid'
    return None if loss.reduction == 'mean' else f'reduction={loss.reduction!r}'
