"""Units of a segmentation head: pixels (SEL-1, SEL-7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.segmentors import BaseSegmentor
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmdistill_ext.functional.checks import given
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from mmdistill_ext.units.pair import HeadPair
from mmdistill_ext.units.pixel.head import find_head, head_losses, is_sigmoid, seg_logits
from mmdistill_ext.units.split.head_split import HeadSplit


class PixelPair(HeadPair):
    """Pairs a head of the student with a head of the teacher, pixel by pixel.

    The student's logits are taken from the arguments of its own ``loss_by_feat`` while it computes
    its loss; the teacher's from the ``forward`` of its head. Both stay at the heads' stride, which
    may differ; the labels are those of the batch, at full size.

    Args:
        student: The student, an mmseg segmentor.
        teacher: The teacher, an mmseg segmentor.
        head: Path of the student's head, such as ``'decode_head'``, ``'auxiliary_head.0'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, a head has no per-pixel logits, or the heads differ in
            classes or output channels.
    """

    label_kinds = 'gt_sem_seg'
    head: BaseDecodeHead
    teacher_head: BaseDecodeHead

    def __init__(
        self, student: BaseSegmentor, teacher: BaseSegmentor, head: str, teacher_head: str, key: str
    ) -> None:
        self.head = find_head(student, head, f'{key}.head')
        self.teacher_head = find_head(teacher, teacher_head, f'{key}.teacher_head')
        for name in ('num_classes', 'out_channels'):
            own, other = getattr(self.head, name), getattr(self.teacher_head, name)
            if own != other:
                raise ValueError(
                    f'`{name}` should be the same for student and teacher (`{key}`). Found {own} '
                    f"in the student's '{head}', {other} in the teacher's '{teacher_head}'."
                )
        self.sigmoid = is_sigmoid(self.head)
        final = student.decode_head
        final = final[-1] if isinstance(final, nn.ModuleList) else final
        self.predicts = self.head is final
        self.heads = head, teacher_head
        self.student_tap = f'{head}.loss_by_feat'
        self.student_taps = (self.student_tap,)
        self.teacher_tap = teacher_head
        self.prefix = head.replace('_head', '').replace('auxiliary', 'aux').replace('.', '_')

    @property
    def num_classes(self) -> int:
        """Number of label classes, 2 for a binary head."""
        return self.head.num_classes

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set."""
        return self.head.num_classes

    @property
    def ignore_index(self) -> int:
        """Label of pixels that are ignored."""
        return self.head.ignore_index

    def fused_loss(self, key: str) -> FusedCrossEntropy:
        """The head's own loss, which the block-wise pass forms in place of the head.

        Args:
            key: The config key that asks for it, to name in errors.

        Raises:
            ValueError: The head's loss is not one plain softmax cross-entropy.
        """
        losses = head_losses(self.head)
        loss = losses[0]
        plain = (
            len(losses) == 1
            and type(loss) is CrossEntropyLoss
            and not (loss.use_sigmoid or loss.use_mask)
            and loss.reduction == 'mean'
            and self.head.sampler is None
            and type(self.head).loss_by_feat is BaseDecodeHead.loss_by_feat
        )
        if not plain or self.sigmoid:
            raise ValueError(
                f'`{key}` needs a head whose loss is one softmax CrossEntropyLoss with '
                f"reduction='mean' and no pixel sampler. Found {type(self.head).__name__} with "
                f'{[type(item).__name__ for item in losses]}.'
            )
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
        """Build the units of one step, one pixel of the labels each (SEL-1)."""
        return Units(
            student=seg_logits(taps[self.student_tap].args[0], self.student_tap),
            teacher=seg_logits(teacher_call.output, self.teacher_tap),
            labels=torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples]),
            ignore_index=self.head.ignore_index,
            sigmoid=self.sigmoid,
            student_align_corners=self.head.align_corners,
            teacher_align_corners=self.teacher_head.align_corners,
            split=split,
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
            ignored = self.head.ignore_index
            valid = label[label != ignored]
            total[0] += F.cross_entropy(image, label, weight, ignore_index=ignored, reduction='sum')
            total[1] += valid.numel() if weight is None else weight[valid].sum()
        return total


def _without_padding(image: Tensor, meta: dict) -> Tensor:
    padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    left, right, top, bottom = padding
    height, width = image.shape[1:]
    return image[:, top : height - bottom, left : width - right]
