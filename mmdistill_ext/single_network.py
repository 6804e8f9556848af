"""From the config of several networks that learn together to that of one of them (COL-7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdistill_ext.losses.collaboration_loss import ENSEMBLE
from mmdistill_ext.package_types import is_of_this_package, registered_name
from mmdistill_ext.registry import OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS


def config_for_network(config: dict, network: str, names: list[str]) -> dict:
    """Copy a config without what is there for several networks; its model stays as it is.

    Args:
        config: The whole config.
        network: Name of the network that stays.
        names: Names of all networks.

    Returns:
        The config, with the network's own evaluator, optimizer wrapper and schedulers.
    """
    config = _without_networks(config, (*names, ENSEMBLE))
    for key in ('val_evaluator', 'test_evaluator'):
        if is_of_this_package(config.get(key)):
            config[key] = config[key]['metrics']
    optim_wrapper = config.get('optim_wrapper') or {}
    if registered_name(optim_wrapper.get('constructor'), OPTIM_WRAPPER_CONSTRUCTORS):
        config['optim_wrapper'] = optim_wrapper[network]
    schedulers = config.get('param_scheduler')
    if isinstance(schedulers, dict) and 'type' not in schedulers:
        config['param_scheduler'] = schedulers[network]
    paramwise = optim_wrapper.get('paramwise_cfg') or {}
    if paramwise.get('custom_keys'):
        paramwise['custom_keys'] = _custom_keys(paramwise['custom_keys'], network)
    return config


def _custom_keys(keys: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Settings of one network's parameters, under the names that they have without the others."""
    prefix = f'students.{network}.'
    return {
        f'{key}.'.removeprefix(prefix).removesuffix('.'): value
        for key, value in keys.items()
        if not key.startswith('students.') or f'{key}.'.startswith(prefix)
    }


def _without_networks(node: Any, names: tuple[str, ...]) -> Any:
    """Copy a part of a config without views of several networks and with plain names of metrics."""
    if isinstance(node, dict):
        copied = {key: _without_networks(value, names) for key, value in node.items()}
        _rename_metrics(copied, names)
        return copied
    if isinstance(node, (list, tuple)):
        items = [_without_views(item) for item in node]
        return type(node)(_without_networks(item, names) for item in items if item is not None)
    return node


def _without_views(node: Any) -> Any:
    """What stays of an item of a list: of the transform that makes views the one that packs."""
    is_view = isinstance(node, dict) and registered_name(node.get('type'), TRANSFORMS)
    return node.get('pack') if is_view else node


def _rename_metrics(node: dict, names: tuple[str, ...]) -> None:
    """Let ``monitor`` and ``save_best`` of a hook or scheduler name metrics of one network."""
    for key in ('monitor', 'save_best'):
        if isinstance(node.get(key), str):
            node[key] = _plain_metric(node[key], names)
    if isinstance(node.get('save_best'), list):
        best, rule = [_plain_metric(name, names) for name in node['save_best']], node.get('rule')
        node['save_best'] = list(dict.fromkeys(best))
        if isinstance(rule, list) and len(rule) == len(best):
            node['rule'] = list(dict(zip(best, rule, strict=True)).values())


def _plain_metric(metric: str, names: tuple[str, ...]) -> str:
    """``'mIoU'`` of ``'a/mIoU'``."""
    network, _, rest = metric.partition('/')
    return rest if network in names else metric
