"""TridentNet (https://arxiv.org/abs/1901.01892)."""

from mmdet.models.roi_heads import TridentRoIHead

from mmdistill_ext.units.roi.families.standard import Standard
from mmdistill_ext.units.roi.family import ROI_FAMILIES


@ROI_FAMILIES.register(TridentRoIHead)
class Trident(Standard):
    """Faster R-CNN that sees each image once per branch while it trains, the branches in turn.

    The teacher looks at the RoIs of every branch in its one look at the image. A Trident teacher
    looks with its middle branch (``test_branch_idx=1``), as it predicts.
    """

    unsplit = 'its backbone runs one branch where `fit` measures, and all while it trains'

    @property
    def looks(self) -> int:
        """Number of branches."""
        return self.roi_head.num_branch

    @property
    def teaches(self) -> bool:
        """Whether it predicts with one branch."""
        return self.roi_head.test_branch_idx != -1
