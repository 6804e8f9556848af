"""Hybrid Task Cascade (https://arxiv.org/abs/1901.07518), with DetectoRS."""

from mmdet.models.roi_heads import HybridTaskCascadeRoIHead
from torch import Tensor

from mmdistill_ext.units.roi.families.cascade import Cascade
from mmdistill_ext.units.roi.family import ROI_FAMILIES, Context


@ROI_FAMILIES.register(HybridTaskCascadeRoIHead)
class HTC(Cascade):
    """A cascade whose heads see the features of a semantic branch, where there is one.

    Masks of a stage are formed on boxes that this stage has refined and sampled again, which is
    what the mask head's own loss is told.
    """

    def context(self, features: tuple[Tensor, ...]) -> Context:
        """The semantic branch's features."""
        if not self.roi_head.with_semantic:
            return {}
        return dict(semantic_feat=self.roi_head.semantic_head(features)[1])
