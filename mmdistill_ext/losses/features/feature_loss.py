"""Distance between features."""

from __future__ import annotations

from torch import Tensor

from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.functional.features.distance import FEATURE_DISTANCES, feature_distance
from mmdistill_ext.losses.averages import weighted_mean
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.units.features import Features


@MODELS.register_module()
class FeatureLoss(DistillLoss):
    """Pulls features to the teacher's (FitNets, https://arxiv.org/abs/1412.6550, eq. 3).

    The mean over the locations of :func:`~mmdistill_ext.functional.features.feature_distance`, by
    their weights, over all ranks' images.

    Args:
        distance: ``'mse'``, or ``'cosine'`` for the direction alone.

    Raises:
        ValueError: There is no such distance.
    """

    takes_features = True

    def __init__(self, distance: str = 'mse') -> None:
        super().__init__()
        check_choice('distance', distance, FEATURE_DISTANCES)
        self.distance = distance

    def forward(self, features: Features, weight: float = 1.0) -> dict[str, Tensor]:
        """Form the loss; exactly 0 where no location counts."""
        distances = feature_distance(*features.counted(), self.distance)
        return dict(loss=weight * weighted_mean(distances, features.weight))

    def extra_repr(self) -> str:
        """The distance."""
        return f'distance={self.distance}'
