"""A normalisation layer."""

from __future__ import annotations

from torch import Tensor, nn

from mmdistill_ext.registry import CONNECTORS


@CONNECTORS.register_module()
class Norm(nn.Module):
    """A normalisation layer of mmcv; the number of channels stays.

    Args:
        in_channels: Channels of what comes before; filled in.
        out_channels: Not used.
        norm_cfg: As in any config of mmcv, e.g. ``dict(type='GN', num_groups=32)``.
    """

    def __init__(
        self, in_channels: int, out_channels: int | None = None, norm_cfg: dict | None = None
    ) -> None:
        super().__init__()
        from mmcv.cnn import build_norm_layer  # takes a second, and few runs want it

        self.norm = build_norm_layer(norm_cfg or dict(type='BN'), in_channels)[1]

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)``."""
        return self.norm(features)
