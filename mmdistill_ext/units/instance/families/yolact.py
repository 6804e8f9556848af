"""Masks of YOLACT (https://arxiv.org/abs/1904.02689)."""

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import YOLACTProtonet
from mmengine.structures import InstanceData
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.instance.family import InstanceFamily, in_one, register
from mmdistill_ext.units.instance.step import InstanceStep

COEFFICIENTS = 2
"""Place of the coefficients in what the box head returns."""
SMALLEST = 1e-6
"""Masks below this, or as near to 1, have no gradient."""


@register(YOLACTProtonet)
class YOLACTMasks(InstanceFamily):
    """Coefficients of a location for prototypes of the image, within the box of the object."""

    loss = 'loss_by_feat'
    taps = ('',)

    def student(self, step: InstanceStep) -> Tensor:
        """Logits of the student's masks, as it computed them for its own loss."""
        masks = step.taps[self.path].output[0]
        return in_one([_logits(masks[x.image][..., x.rows]) for x in step.chosen])

    def teacher(self, step: InstanceStep, student: InstanceFamily) -> Tensor:
        """Logits of the teacher's masks by its own coefficients, at its own size."""
        coefficients = self.of_teacher(step, COEFFICIENTS, self.head.num_protos)
        positive = [InstanceData(coeffs=of_image) for of_image in coefficients]
        masks, _ = self.head(step.teacher_call.args[0], positive)
        return in_one([_logits(of_image) for of_image in masks])

    def labels(self, step: InstanceStep) -> Tensor:
        """The object's mask within its box, with a pixel around it; what is outside is ignored."""
        height, width, _ = step.taps[self.path].output[0][0].shape
        labels = []
        for chosen, masks in step.masks_of():
            if len(masks):
                masks = F.interpolate(masks[None], (height, width), mode='bilinear')[0]
            meta, positive = step.samples[chosen.image].metainfo, self.positive(step)
            whole = masks.new_ones(height, width, len(masks))
            box = positive[chosen.image].bboxes[chosen.rows] / masks.new_tensor(
                meta['img_shape'][1::-1] * 2
            )
            inside = self.head.crop_single(whole, box).movedim(-1, 0) > 0
            labels.append((masks > 0.5).long().view_as(inside).where(inside, IGNORED))
        return torch.cat(labels)


def _logits(masks: Tensor) -> Tensor:
    """Scores ``(h, w, K)`` as logits ``(K, h, w)``."""
    return full_precision(masks).logit(SMALLEST).movedim(-1, 0)
