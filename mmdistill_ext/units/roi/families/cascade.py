"""Cascade R-CNN (https://arxiv.org/abs/1712.00726)."""

from mmdet.models.roi_heads import CascadeRoIHead

from mmdistill_ext.units.roi.family import ROI_FAMILIES, RoIFamily


@ROI_FAMILIES.register(CascadeRoIHead)
class Cascade(RoIFamily):
    """A box head, and perhaps a mask head, for each stage; the last stage is what predicts."""

    def predicts(self, stage: tuple[int, ...]) -> bool:
        """Whether it is the last stage."""
        return not stage or stage[0] == self.roi_head.num_stages - 1

    def loss_weight(self, stage: tuple[int, ...], method: str) -> float:
        """The weight of the stage's losses."""
        return self.roi_head.stage_loss_weights[stage[0]] if stage else 1.0
