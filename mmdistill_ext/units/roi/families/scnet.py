"""SCNet (https://arxiv.org/abs/2012.10150)."""

from typing import Any

from mmdet.models.roi_heads import SCNetRoIHead
from torch import Tensor

from mmdistill_ext.units.roi.families.cascade import Cascade
from mmdistill_ext.units.roi.family import ROI_FAMILIES, Context


@ROI_FAMILIES.register(SCNetRoIHead)
class SCNet(Cascade):
    """A cascade of box heads with one mask head, which sees what the last box head saw of a RoI.

    All heads see the features of a semantic and of a global branch, where there are such.
    """

    def loss_weight(self, stage: tuple[int, ...], method: str) -> float:
        """The weight of the stage's losses; of the one mask head, the sum of all."""
        return (
            super().loss_weight(stage, method) if stage else sum(self.roi_head.stage_loss_weights)
        )

    def context(self, features: tuple[Tensor, ...]) -> Context:
        """The features of the semantic and of the global branch."""
        head, found = self.roi_head, {}
        if head.with_semantic:
            found['semantic_feat'] = head.semantic_head(features)[1]
        if head.with_glbctx:
            found['glbctx_feat'] = head.glbctx_head(features)[1]
        return found

    def run(
        self,
        method: str,
        stage: tuple[int, ...],
        features: tuple[Tensor, ...],
        rois: Tensor,
        context: Context,
    ) -> dict[str, Any]:
        """Run a head on given RoIs; masks after the last box head, as for a prediction."""
        if method == '_mask_forward' and self.roi_head.with_feat_relay:
            last = self.roi_head._bbox_forward(-1, features, rois, **context)
            relayed = self.roi_head.feat_relay_head(last['relayed_feat'])
            context = {**context, 'relayed_feat': relayed}
        return super().run(method, stage, features, rois, context)
