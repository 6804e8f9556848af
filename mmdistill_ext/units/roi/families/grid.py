"""Grid R-CNN (https://arxiv.org/abs/1811.12030)."""

from mmdet.models.roi_heads import GridRoIHead

from mmdistill_ext.units.roi.families.standard import Standard
from mmdistill_ext.units.roi.family import ROI_FAMILIES


@ROI_FAMILIES.register(GridRoIHead)
class Grid(Standard):
    """Faster R-CNN whose box head predicts classes; boxes come from heatmaps, which are no units.

    A head without boxes is compared and distilled by class alone.
    """
