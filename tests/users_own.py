"""Parts that a user writes outside of the package, in a module named by ``custom_imports``."""

import torch
from torch import nn

from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import CONNECTORS, MODELS


@MODELS.register_module()
class Growing(DistillLoss):
    """A loss of features that learns a scale, and counts more from step to step."""

    takes_features = True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer('steps', torch.zeros(()))

    def forward(self, features, weight=1.0):
        self.steps += 1
        difference = self.scale * features.student - features.teacher
        loss = (1 + 0.1 * self.steps) * difference.square().mean()
        return dict(loss=weight * loss, loss_scale=0.1 * self.scale.square())


@MODELS.register_module()
class LogitGap(DistillLoss):
    """A loss of units that knows nothing of a head's own loss, with a parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, units, weight=1.0):
        return dict(loss=weight * (self.conv(units.student) - units.teacher).square().mean())


@CONNECTORS.register_module()
class Gated(nn.Module):
    """A connector: a linear map of the channels, times a gate for each."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.gate = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def forward(self, features):
        return self.conv(features) * self.gate.sigmoid()
