"""Another resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmdistill_ext.functional.checks import check_positive
from mmdistill_ext.registry import CONNECTORS


@CONNECTORS.register_module()
class Resize(nn.Module):
    """Bilinear resizing by a factor; without it features are brought to one grid at the end.

    Args:
        in_channels: Not used.
        out_channels: Not used.
        scale_factor: > 0.

    Raises:
        ValueError: The factor is not above 0.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        scale_factor: float = 2.0,
    ) -> None:
        super().__init__()
        check_positive('scale_factor', scale_factor)
        self.scale_factor = scale_factor

    def forward(self, features: Tensor) -> Tensor:
        """Resize ``(B, C, H, W)``."""
        return F.interpolate(
            features, scale_factor=self.scale_factor, mode='bilinear', antialias=True
        )

    def extra_repr(self) -> str:
        """The factor."""
        return f'scale_factor={self.scale_factor}'
