"""Registered connectors: from the student's features to the teacher's number of channels.

A connector of one's own is a module with the arguments ``in_channels`` and ``out_channels``,
registered with ``@CONNECTORS.register_module()``; it takes and returns ``(B, C, H, W)``.
"""

from mmdistill_ext.connectors.conv import Conv1x1
from mmdistill_ext.connectors.mlp import MLP
from mmdistill_ext.connectors.norm import Norm
from mmdistill_ext.connectors.resize import Resize

__all__ = ['MLP', 'Conv1x1', 'Norm', 'Resize']
