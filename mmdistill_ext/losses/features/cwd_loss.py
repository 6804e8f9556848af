"""Channel-wise distillation."""

from __future__ import annotations

from torch import Tensor

from mmdistill_ext.functional.checks import check_temperature
from mmdistill_ext.functional.features.cwd import channel_distillation
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.units.features import Features


@MODELS.register_module()
class CWDLoss(DistillLoss):
    """Distils where each channel is active (CWD, https://arxiv.org/abs/2011.13256, eq. 4).

    For features and for the logits of a segmentation head (``tap='decode_head'``); the mean over
    the images.

    Args:
        temperature: > 0; the loss is multiplied by its square.

    Raises:
        ValueError: The temperature is not above 0.
    """

    takes_features = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, features: Features, weight: float = 1.0) -> dict[str, Tensor]:
        """Form the loss; exactly 0 for images where no location counts."""
        images = channel_distillation(
            features.student, features.teacher, self.temperature, features.weight
        )
        return dict(loss=weight * images.sum() / max(len(images), 1))

    def extra_repr(self) -> str:
        """The temperature."""
        return f'temperature={self.temperature}'
