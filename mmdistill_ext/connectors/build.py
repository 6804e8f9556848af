"""From a connector's config to a module of the right channels."""

from __future__ import annotations

import torch
from torch import nn

from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.registry import CONNECTORS


def build_connector(
    cfg: dict | list[dict], in_channels: int, out_channels: int, key: str
) -> nn.Sequential:
    """Build a connector, or several one after the other.

    Building it draws no random number from the training's generators.

    Args:
        cfg: Config of a connector, or a list of such.
        in_channels: Channels of the student's features.
        out_channels: Channels that they should have in the end.
        key: The config key to name in errors.

    Raises:
        ValueError: There is no such connector, a value is impossible, or its output has other
            channels than ``out_channels``.
    """
    configs = cfg if isinstance(cfg, (list, tuple)) else [cfg]
    modules, channels = [], in_channels
    for part in configs:
        sizes = dict(in_channels=channels, out_channels=out_channels)
        with isolated_rng():
            modules.append(CONNECTORS.build_part(part, key, 'Conv1x1', **sizes))
        channels = _channels_after(modules[-1], channels, key)
    if channels != out_channels:
        raise ValueError(
            f"`{key}` should give {out_channels} channels, the teacher's. Found {channels}: add "
            "dict(type='Conv1x1')."
        )
    return nn.Sequential(*modules)


@torch.no_grad()
def _channels_after(module: nn.Module, channels: int, key: str) -> int:
    training = module.training
    module.eval()
    try:
        with isolated_rng():
            return module(torch.zeros(1, channels, 8, 8)).shape[1]
    except RuntimeError as error:
        raise ValueError(f'`{key}` should take {channels} channels. Found: {error}') from error
    finally:
        module.train(training)
