"""Ship the student: a plain config and a weights-only checkpoint that know nothing of us."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import Registry
from torch import nn

from mmdistill_ext.checkpoint import load_exactly, load_weights, write_atomic
from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.losses.collaboration_loss import ENSEMBLE
from mmdistill_ext.registry import (
    EVALUATOR,
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    SCOPE,
    TRANSFORMS,
)

SCORES = 'networks.json'
"""File of a collaborative run's folder with every validation's scores."""


def is_distillation(cfg: Config) -> bool:
    """Whether the config's model is a distiller of this package, with a student to stand alone."""
    model = cfg.get('model') or {}
    return _is_of_this_package(model) and 'student' in model


def is_collaboration(cfg: Config) -> bool:
    """Whether the config's model is several networks that learn together."""
    model = cfg.get('model') or {}
    return _is_of_this_package(model) and 'students' in model


def plain_config(cfg: Config, network: str | None = None) -> Config:
    """Return the config that trains or tests the student alone.

    The model is the student's own; hooks and imports of this package are gone. Everything else,
    data and schedule among them, is as it was.

    Args:
        cfg: Any config. One that distils nothing comes back as it is.
        network: Name of the network, of several that learn together; without a name, their config
            comes back as it is.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: ``model.student`` names no model, or
            there is no such network.
    """
    if is_collaboration(cfg) and network is not None:
        source, key = cfg.model.students.get(network), f'model.students.{network}'
        if source is None:
            raise ValueError(
                f"`network` should be one of {', '.join(cfg.model.students)}. Found '{network}'."
            )
    elif is_distillation(cfg):
        source, key = cfg.model.student, 'model.student'
    else:
        return cfg
    plain = cfg.to_dict()
    student = resolve_model_cfg(source, key).to_dict()
    preprocessor = plain['model'].get('data_preprocessor') or plain.get('data_preprocessor')
    if preprocessor:
        student.setdefault('data_preprocessor', preprocessor)
    if student['_scope_'] == plain.get('default_scope'):
        del student['_scope_']
    default_hooks = plain.pop('default_hooks', None) or {}
    custom_hooks = plain.pop('custom_hooks', None) or []
    kept = dict(
        default_hooks={
            name: hook for name, hook in default_hooks.items() if not _is_of_this_package(hook)
        },
        custom_hooks=[hook for hook in custom_hooks if not _is_of_this_package(hook)],
        custom_imports=_other_imports(plain.pop('custom_imports', None) or {}),
    )
    plain.update({key: value for key, value in kept.items() if value}, model=student)
    if is_collaboration(cfg):
        plain = for_one_network(plain, network, list(cfg.model.students))
    return Config(plain, filename=cfg.filename)


def export_student(
    cfg: Config | str | os.PathLike,
    checkpoint: str,
    out_dir: str | os.PathLike,
    network: str | None = None,
) -> tuple[Path, Path]:
    """Write ``student.py`` and ``student.pth``, which mmseg's and mmdet's own tools accept.

    What is taken is the checkpoint's ``state_dict``: after a run with ``EMAHook`` these are the
    averaged weights already, the ones that were validated. Optimizer, schedulers, logs and
    connectors stay behind. Each file is written whole or not at all.

    Args:
        cfg: The distillation config, or a plain one: then only the weights are stripped.
        checkpoint: A training checkpoint, file or URL. Nothing in it is executed.
        out_dir: Folder to write into, made when missing.
        network: Of several that learned together: the name of one, or ``'best'``, the best at the
            checkpoint's last validation.

    Returns:
        Paths of the config and of the checkpoint.

    Raises:
        FileNotFoundError: Config or checkpoint is missing.
        ValueError: The checkpoint is damaged, needs code to unpickle, or is not the student's:
            then the message names the keys.
    """
    if not isinstance(cfg, Config):
        if not Path(cfg).is_file():
            raise FileNotFoundError(f"`config` should be an existing file. Found '{cfg}'.")
        cfg = Config.fromfile(cfg)
    if is_collaboration(cfg) and network is None:
        raise ValueError(
            f'`network` should be one of {", ".join(cfg.model.students)}, or best. Found none.'
        )
    if network == 'best':
        network = best_network(checkpoint)
    plain = plain_config(cfg, network)
    student, meta = load_student(plain, checkpoint, network)

    text = _with_test_pipeline(plain).pretty_text
    provenance = {k: meta[k] for k in ('epoch', 'iter', 'experiment_name') if k in meta}
    content = dict(
        state_dict=student.state_dict(),
        meta=dict(
            dataset_meta=_plain_data(meta.get('dataset_meta') or {}),
            cfg=text,
            exported_from=Path(checkpoint).name,
            **provenance,
        ),
    )
    config_path, weights_path = Path(out_dir, 'student.py'), Path(out_dir, 'student.pth')
    write_atomic(weights_path, lambda path: torch.save(content, path))
    write_atomic(config_path, lambda path: path.write_text(text, encoding='utf-8'))
    return config_path, weights_path


def load_student(
    plain: Config, checkpoint: str, network: str | None = None
) -> tuple[nn.Module, dict]:
    """Build the model of a plain config and fill it from a checkpoint, without running code.

    Args:
        plain: The config.
        checkpoint: File or URL.
        network: Whose weights to take, of several that learned together.

    Returns:
        The model, in eval mode on the CPU, and the checkpoint's meta data.

    Raises:
        FileNotFoundError, ValueError: As :func:`export_student`.
    """
    scope = {'_scope_': plain.default_scope} if plain.get('default_scope') else {}
    model = build_model({**scope, **plain.model.to_dict()})
    loaded = load_weights(checkpoint)
    state = loaded['state_dict']
    if network is not None:
        prefix = f'students.{network}.'
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise ValueError(
                f"`network` should be one of those in `checkpoint`. Found '{network}', and no "
                f"'{prefix}...' in '{checkpoint}'."
            )
    load_exactly(model, state, f"`checkpoint` '{checkpoint}'")
    return model.eval(), loaded['meta']


def best_network(checkpoint: str) -> str:
    """The best network at the last validation before a checkpoint was written, or at it.

    Raises:
        FileNotFoundError: There is no ``networks.json`` beside the checkpoint.
        ValueError: There was no validation until then.
    """
    path = Path(checkpoint).parent / SCORES
    if not path.is_file():
        raise FileNotFoundError(
            f"`network`='best' needs the run's {SCORES} beside the checkpoint, which "
            f"`CollaborationHook` writes. There is no '{path}': name a network."
        )
    scores = json.loads(path.read_text(encoding='utf-8'))
    until = load_weights(checkpoint)['meta'].get('iter', math.inf)
    known = [int(at) for at in scores if int(at) <= until and scores[at]['best']]
    if not known:
        raise ValueError(
            f"`network`='best' needs a validation before the checkpoint's iteration {until}. "
            f"'{path}' has those of the iterations {list(scores)}: name a network."
        )
    return scores[str(max(known))]['best']


def for_one_network(plain: dict, network: str, names: list[str]) -> dict:
    """Copy a config without what is there for several networks, ``names``."""
    plain = _strip_networks(plain, (*names, ENSEMBLE))
    for key in ('val_evaluator', 'test_evaluator'):
        if _is_of_this_package(plain.get(key)):
            plain[key] = plain[key]['metrics']
    optim_wrapper = plain.get('optim_wrapper') or {}
    if _is_named(optim_wrapper.get('constructor'), OPTIM_WRAPPER_CONSTRUCTORS):
        plain['optim_wrapper'] = optim_wrapper[network]
    schedulers = plain.get('param_scheduler')
    if isinstance(schedulers, dict) and 'type' not in schedulers:
        plain['param_scheduler'] = schedulers[network]
    paramwise = optim_wrapper.get('paramwise_cfg') or {}
    if paramwise.get('custom_keys'):
        paramwise['custom_keys'] = {
            f'{key}.'.removeprefix(f'students.{network}.').removesuffix('.'): value
            for key, value in paramwise['custom_keys'].items()
            if not key.startswith('students.') or f'{key}.'.startswith(f'students.{network}.')
        }
    return plain


def _strip_networks(node: Any, names: tuple[str, ...]) -> Any:
    """Copy a config without the views of several networks, their metrics by their plain names."""
    if isinstance(node, dict):
        node = {key: _strip_networks(value, names) for key, value in node.items()}
        if isinstance(node.get('monitor'), str):
            node['monitor'] = _plain_metric(node['monitor'], names)
        if isinstance(node.get('save_best'), str):
            node['save_best'] = _plain_metric(node['save_best'], names)
        elif isinstance(node.get('save_best'), list):
            best, rule = [_plain_metric(x, names) for x in node['save_best']], node.get('rule')
            node['save_best'] = list(dict.fromkeys(best))
            if isinstance(rule, list) and len(rule) == len(best):
                node['rule'] = list(dict(zip(best, rule, strict=True)).values())
        return node
    if isinstance(node, (list, tuple)):
        return type(node)(
            _strip_networks(item, names)
            for item in node
            if not (isinstance(item, dict) and _is_named(item.get('type'), TRANSFORMS))
        )
    return node


def _plain_metric(metric: str, names: tuple[str, ...]) -> str:
    """``'mIoU'`` of ``'a/mIoU'``."""
    network, _, rest = metric.partition('/')
    return rest if network in names else metric


def _is_named(kind: Any, registry: Registry) -> bool:
    """Whether this is the type of something in a registry of this package."""
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return name.removeprefix(f'{SCOPE}.') in registry.module_dict


def _is_of_this_package(node: Any) -> bool:
    """Whether a config node with a ``type`` is built by this package."""
    if not isinstance(node, Mapping) or 'type' not in node:
        return False
    kind = node['type']
    name = kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'
    return (
        name.startswith(f'{SCOPE}.')
        or node.get('_scope_') == SCOPE
        or name in MODELS.module_dict
        or name in HOOKS.module_dict
        or name in EVALUATOR.module_dict
    )


def _with_test_pipeline(plain: Config) -> Config:
    """Name the test pipeline at the top, where ``mmseg.apis.inference_model`` looks for it."""
    dataset = (plain.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    named = dict(test_pipeline=dataset['pipeline']) if 'pipeline' in dataset else {}
    return Config({**named, **plain.to_dict()})


def _other_imports(imports: Mapping) -> dict:
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else names
    names = [name for name in names if name.partition('.')[0] != SCOPE]
    return {**imports, 'imports': names} if names else {}


def _plain_data(value: Any) -> Any:
    """Turn arrays into lists, so that the file needs no code but PyTorch's to be read."""
    if isinstance(value, Mapping):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_data(item) for item in value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
