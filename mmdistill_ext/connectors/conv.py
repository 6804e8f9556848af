"""A linear map of channels."""

from __future__ import annotations

from torch import nn

from mmdistill_ext.registry import CONNECTORS


@CONNECTORS.register_module()
class Conv1x1(nn.Conv2d):
    """One linear map of the channels at every location (FitNets, https://arxiv.org/abs/1412.6550).

    Args:
        in_channels: Channels of the student's features; filled in.
        out_channels: Channels of the teacher's features; filled in.
        bias: Add a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
