"""Heads of mmseg that give more than one map, or something else than a map."""

from __future__ import annotations

from typing import Any

from mmseg.models import decode_heads as heads
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.pixel.activation import log_scores, mask_logits
from mmdistill_ext.units.pixel.head_logits import HeadLogits, register_logits

register_logits(BaseDecodeHead, BaseCascadeDecodeHead)(HeadLogits)


@register_logits(heads.DAHead, heads.EncHead, heads.DDRHead)
class FirstOutput(HeadLogits):
    """The first output, or the only one: the others are trained, but not predicted with."""

    def pick(self, output: Any) -> Any:
        """The logits among what ``forward`` gave, in training or in eval mode."""
        return output[0] if isinstance(output, tuple) else output


@register_logits(heads.PIDHead)
class SecondOutput(HeadLogits):
    """The second of three (P, I and D branch), or the only one."""

    def pick(self, output: Any) -> Any:
        """The logits among what ``forward`` gave, in training or in eval mode."""
        return output[1] if isinstance(output, tuple) else output


@register_logits(heads.IterativeDecodeHead)
class LastIteration(HeadLogits):
    """K-Net: the masks of the last iteration; the losses are those of the first head."""

    def pick(self, output: Any) -> Any:
        """The logits among what ``forward`` gave, in training or in eval mode."""
        return output[-1] if isinstance(output, list) else output

    @property
    def losses(self) -> list[Any]:
        """Loss modules of the logits."""
        return HeadLogits(self.head.kernel_generate_head).losses


@register_logits(heads.PointHead)
class Points(HeadLogits):
    """PointRend: points in training, the refined map when it predicts."""

    output_method = 'predict_by_feat'
    every_pixel = False

    def of_output(self, call: Call) -> Tensor:
        """Logits ``(B, C, H, W)`` from a call of the output method."""
        return call.args[0]

    def points(self, call: Call) -> Tensor:
        """Where the logits of :meth:`of_loss` are, ``(B, N, 2)`` in [0, 1]."""
        return call.args[1]


class MaskClasses(HeadLogits):
    """Mask classification: queries, from which the head predicts a score of each class per pixel.

    See :func:`~mmdistill_ext.units.pixel.activation.mask_logits`. The losses, of queries, say
    nothing of these logits.
    """

    def pick(self, output: Any) -> Tensor:
        """The logits among the classes and masks of all layers that ``forward`` gave."""
        classes, masks = output[:2]
        return mask_logits(classes[-1], masks[-1])

    def of_loss(self, call: Call) -> Tensor:
        """Logits ``(B, C, H, W)`` from a call of the loss method."""
        return self.pick(call.args)

    def of_map(self, predicted: Tensor) -> Tensor:
        """Logits from the scores ``(B, C, H, W)`` that the segmentor's ``inference`` gives."""
        return log_scores(predicted)

    @property
    def losses(self) -> list[Any]:
        """Loss modules of the logits: none."""
        return []


register_logits(heads.MaskFormerHead, heads.Mask2FormerHead)(MaskClasses)


@register_logits(heads.SideAdapterCLIPHead)
class SideAdapter(MaskClasses):
    """SAN: mask classification that gives the masks first; its loss takes the classes first."""

    def of_output(self, call: Call) -> Tensor:
        """Logits ``(B, C, H, W)`` from a call of the output method."""
        masks, classes = call.output
        return self.pick((classes, masks))


@register_logits(heads.VPDDepthHead)
class Depth(HeadLogits):
    """A head that predicts depth."""

    refused = 'predicts depth, no classes per pixel'


@register_logits(heads.STDCHead)
class Boundaries(HeadLogits):
    """STDC's third auxiliary head."""

    refused = 'predicts boundaries between classes, which the labels do not name'
