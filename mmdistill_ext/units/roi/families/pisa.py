"""Prime Sample Attention (https://arxiv.org/abs/1904.04821)."""

from mmdet.models.roi_heads import PISARoIHead
from mmdet.structures.bbox import bbox2roi

from mmdistill_ext.taps import Call
from mmdistill_ext.units.roi.families.standard import Standard
from mmdistill_ext.units.roi.family import ROI_FAMILIES, BoxCall


@ROI_FAMILIES.register(PISARoIHead)
class PISA(Standard):
    """Faster and Mask R-CNN whose RoI head weighs the sampled RoIs by their rank.

    It asks the box head for targets and losses itself, and its sampler does so before: what the
    loss is formed of is read from ``bbox_loss`` of the RoI head. Distillation counts every sampled
    RoI alike.
    """

    unsplit = 'PISA weighs the rows of its losses by their rank among each other'
    sampled_by = 'roi_head.bbox_loss'

    def box_call(self, call: Call) -> BoxCall:
        """What the box head predicted, from the call of ``bbox_loss``."""
        _, results, *_ = call.args
        rois = bbox2roi([result.priors for result in results])
        return BoxCall(call.output['cls_score'], call.output['bbox_pred'], rois, results)
