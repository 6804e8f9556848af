"""Masks of RTMDet-Ins (https://arxiv.org/abs/2212.07784)."""

import torch
from mmdet.models.dense_heads import RTMDetInsHead
from mmdet.models.dense_heads.rtmdet_ins_head import MaskFeatModule
from torch import Tensor, nn

from mmdistill_ext.units.instance.family import InstanceFamily, in_one, register
from mmdistill_ext.units.instance.step import InstanceStep

FILTERS, FEATURES = 2, 3
"""Places of the filters and of the features of the masks in what the head returns."""
SAMPLED = 5
"""Place of what was sampled in the targets."""


@register(MaskFeatModule)
class RTMDetInsMasks(InstanceFamily):
    """Filters of a location over features of the image, and the place relative to the location."""

    loss = 'loss_mask_by_feat'

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__(model, path)
        self.dense = path.rpartition('.')[0]
        self.box_head: RTMDetInsHead = model.get_submodule(self.dense)

    @property
    def owner(self) -> str:
        """Path of the whole head, which forms the loss of the masks too."""
        return self.dense

    def objects(self, step: InstanceStep) -> Tensor:
        """The object assigned to each positive location of all images, ``(P,)``."""
        sampled = step.taps[f'{self.dense}.get_targets'].output[SAMPLED]
        return torch.cat([image.pos_assigned_gt_inds for image in sampled])

    def student(self, step: InstanceStep) -> Tensor:
        """The student's mask logits, by its own filters."""
        predicted = step.taps[f'{self.dense}.loss_by_feat'].args
        own = step.dense.student
        maps = own.common(predicted[FILTERS])
        flat = own.family.flatten(maps, self.box_head.num_gen_params)
        filters = [flat[chosen.image, chosen.units] for chosen in step.chosen]
        return self._masks(step, predicted[FEATURES], filters)

    def teacher(self, step: InstanceStep, student: InstanceFamily) -> Tensor:
        """The teacher's mask logits by its own filters, at its own size."""
        filters = self.of_teacher(step, FILTERS, self.box_head.num_gen_params)
        return self._masks(step, step.teacher_call.output[FEATURES], filters)

    def _masks(self, step: InstanceStep, features: Tensor, filters: list[Tensor]) -> Tensor:
        points = step.dense.student.priors
        strides = step.dense.student.strides[:, None].expand(-1, 2)
        priors = torch.cat((points[:, :2], strides), 1)
        return in_one(
            [
                self.box_head._mask_predict_by_feat_single(
                    features[chosen.image], of_image, priors[chosen.units]
                )
                for chosen, of_image in zip(step.chosen, filters, strict=True)
            ]
        )

    def labels(self, step: InstanceStep) -> Tensor:
        """Every so many pixels of the object's mask."""
        stride = self.box_head.mask_loss_stride
        pixels = slice(stride // 2, None, stride)
        return torch.cat([masks[:, pixels, pixels] for _, masks in step.masks_of()]).long()
