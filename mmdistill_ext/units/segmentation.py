"""Units of a segmentation head: pixels (SEL-1, SEL-7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor, nn

from mmdistill_ext.taps import Call, resolve
from mmdistill_ext.units.base import TaskLoss, Units

if TYPE_CHECKING:
    from mmseg.structures import SegDataSample


class SegmentationUnits:
    """Pairs a head of the student with a head of the teacher, pixel by pixel.

    The student's logits are taken from the arguments of its own ``loss_by_feat`` while it computes
    its loss; the teacher's from the ``forward`` of its head. Both stay at the heads' stride, which
    may differ; the labels are those of the batch, at full size.

    Args:
        student: The student, an mmseg segmentor.
        teacher: The teacher, an mmseg segmentor.
        head: Path of the student's head, e.g. ``'decode_head'`` or ``'auxiliary_head.0'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, a head has no per-pixel logits, or the heads differ in
            classes or output channels.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.head = _find_head(student, head, f'{key}.head')
        self.teacher_head = _find_head(teacher, teacher_head, f'{key}.teacher_head')
        for name in ('num_classes', 'out_channels'):
            own, other = getattr(self.head, name), getattr(self.teacher_head, name)
            if own != other:
                raise ValueError(
                    f'`{name}` should be the same for student and teacher (`{key}`). Found {own} '
                    f"in the student's '{head}', {other} in the teacher's '{teacher_head}'."
                )
        self.sigmoid = self.head.out_channels == 1 or any(
            getattr(loss, 'use_sigmoid', False) for loss in _losses(self.head)
        )
        self.student_tap = f'{head}.loss_by_feat'
        self.teacher_tap = teacher_head
        self.prefix = head.replace('_head', '').replace('auxiliary', 'aux').replace('.', '_')

    @property
    def num_classes(self) -> int:
        """Number of label classes."""
        return self.head.num_classes

    def task_loss(self, key: str) -> TaskLoss:
        """The head's own loss, if the selective pass can form it.

        Raises:
            ValueError: The head's loss is not one plain softmax cross-entropy.
        """
        losses = _losses(self.head)
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
                f'`{key}=True` needs a head whose loss is one softmax CrossEntropyLoss with '
                f"reduction='mean' and no pixel sampler. Found {type(self.head).__name__} with "
                f'{[type(item).__name__ for item in losses]}; use `{key}=False`.'
            )
        weight = loss.class_weight
        return TaskLoss(
            name=loss.loss_name,
            loss_weight=loss.loss_weight,
            class_weight=None if weight is None else tuple(float(w) for w in weight),
            avg_non_ignore=loss.avg_non_ignore,
        )

    def __call__(
        self,
        student_call: Call,
        teacher_call: Call,
        data_samples: list[SegDataSample],
        task: TaskLoss | None = None,
    ) -> Units:
        """Build the units of one step from the two tapped calls."""
        return Units(
            student=_logits(student_call.args[0], self.student_tap),
            teacher=_logits(teacher_call.output, self.teacher_tap),
            labels=torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples]),
            ignore_index=self.head.ignore_index,
            sigmoid=self.sigmoid,
            student_align_corners=self.head.align_corners,
            teacher_align_corners=self.teacher_head.align_corners,
            task=task,
        )


def _find_head(model: nn.Module, path: str, key: str) -> BaseDecodeHead:
    head, _ = resolve(model, path, key)
    if not isinstance(head, BaseDecodeHead):
        raise ValueError(
            f"`{key}` should lead to a per-pixel head (a subclass of mmseg's BaseDecodeHead). "
            f"Found '{path}', a {type(head).__name__}."
        )
    return head


def _losses(head: BaseDecodeHead) -> list[nn.Module]:
    loss = head.loss_decode
    return list(loss) if isinstance(loss, nn.ModuleList) else [loss]


def _logits(output: object, path: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise TypeError(
            f"The head at '{path}' should give one tensor of logits (B, C, H, W). "
            f'Found {type(output).__name__}; name another head.'
        )
    return output
