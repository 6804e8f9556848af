"""A small network at every location."""

from __future__ import annotations

from torch import nn

from mmdistill_ext.connectors.conv import Conv1x1
from mmdistill_ext.registry import CONNECTORS


@CONNECTORS.register_module()
class MLP(nn.Sequential):
    """Two linear maps of the channels with a ReLU between them, at every location.

    Args:
        in_channels: Channels of the student's features; filled in.
        out_channels: Channels of the teacher's features; filled in.
        hidden_channels: Channels between the two maps; ``out_channels`` when not given.

    Raises:
        ValueError: ``hidden_channels`` is not above 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden_channels: int | None = None
    ) -> None:
        hidden = out_channels if hidden_channels is None else hidden_channels
        if type(hidden) is not int or hidden < 1:
            raise ValueError(f'`hidden_channels` should be an integer >= 1. Found {hidden!r}.')
        super().__init__(
            Conv1x1(in_channels, hidden), nn.ReLU(inplace=True), Conv1x1(hidden, out_channels)
        )
