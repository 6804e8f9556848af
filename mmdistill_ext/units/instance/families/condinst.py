"""Masks of CondInst (https://arxiv.org/abs/2003.05664)."""

import torch
from mmdet.models.dense_heads import BoxInstMaskHead, CondInstMaskHead
from mmengine.structures import InstanceData
from torch import Tensor

from mmdistill_ext.units.instance.family import InstanceFamily, in_one, register
from mmdistill_ext.units.instance.step import InstanceStep

FILTERS = 3
"""Place of the filters in what the box head returns."""


@register(CondInstMaskHead)
class CondInstMasks(InstanceFamily):
    """Filters of a location over features of the image, and the place relative to the location."""

    loss = 'loss_by_feat'
    taps = ('',)

    def student(self, step: InstanceStep) -> Tensor:
        """The student's mask logits, as it computed them for its own loss."""
        (masks,) = step.taps[self.path].output
        return in_one([masks[x.image].flatten(0, -3)[x.rows] for x in step.chosen])

    def teacher(self, step: InstanceStep, student: InstanceFamily) -> Tensor:
        """The teacher's mask logits by its own filters, at its own size."""
        filters, positive = self.of_teacher(step, FILTERS, self.head.num_params), []
        for chosen, of_image, own in zip(step.chosen, filters, student.positive(step), strict=True):
            places = dict(points=own.points[chosen.rows], strides=own.strides[chosen.rows])
            positive.append(InstanceData(param_preds=of_image, **places))
        (masks,) = self.head(step.teacher_call.args[0], positive)
        return in_one([x.flatten(0, -3) for x in masks])

    def labels(self, step: InstanceStep) -> Tensor:
        """Every so many pixels of the object's mask."""
        stride = self.head.mask_out_stride
        pixels = slice(stride // 2, None, stride)
        masks = [masks[:, pixels, pixels] for _, masks in step.masks_of()]
        return (torch.cat(masks) > 0.5).long()


@register(BoxInstMaskHead)
class BoxInstMasks(CondInstMasks):
    """Masks that are learnt from boxes and colours."""

    refused = 'its labels are boxes, no masks'
