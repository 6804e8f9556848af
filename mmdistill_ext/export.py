"""Ship the student: a plain config and a weights-only checkpoint that know nothing of us."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from mmdistill_ext.checkpoint import load_exactly, load_weights, write_atomic
from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.registry import HOOKS, MODELS, SCOPE


def is_distillation(cfg: Config) -> bool:
    """Whether the config's model is a distiller of this package, with a student to stand alone."""
    model = cfg.get('model') or {}
    return _is_ours(model) and 'student' in model


def plain_config(cfg: Config) -> Config:
    """Return the config that trains or tests the student alone.

    The model is the student's own; hooks and imports of this package are gone. Everything else,
    data and schedule among them, is as it was.

    Args:
        cfg: Any config. One that distils nothing comes back as it is.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: ``model.student`` names no model.
    """
    if not is_distillation(cfg):
        return cfg
    plain = cfg.to_dict()
    student = resolve_model_cfg(cfg.model.student, 'model.student').to_dict()
    preprocessor = plain['model'].get('data_preprocessor') or plain.get('data_preprocessor')
    if preprocessor:
        student.setdefault('data_preprocessor', preprocessor)
    if student['_scope_'] == plain.get('default_scope'):
        del student['_scope_']
    default_hooks = plain.pop('default_hooks', None) or {}
    custom_hooks = plain.pop('custom_hooks', None) or []
    kept = dict(
        default_hooks={name: hook for name, hook in default_hooks.items() if not _is_ours(hook)},
        custom_hooks=[hook for hook in custom_hooks if not _is_ours(hook)],
        custom_imports=_imports_without_us(plain.pop('custom_imports', None) or {}),
    )
    plain.update({key: value for key, value in kept.items() if value}, model=student)
    return Config(plain, filename=cfg.filename)


def export_student(
    cfg: Config | str | os.PathLike, checkpoint: str, out_dir: str | os.PathLike
) -> tuple[Path, Path]:
    """Write ``student.py`` and ``student.pth``, which mmseg's and mmdet's own tools accept.

    What is taken is the checkpoint's ``state_dict``: after a run with ``EMAHook`` these are the
    averaged weights already, the ones that were validated. Optimizer, schedulers, logs and
    connectors stay behind. Each file is written whole or not at all.

    Args:
        cfg: The distillation config, or a plain one: then only the weights are stripped.
        checkpoint: A training checkpoint, file or URL. Nothing in it is executed.
        out_dir: Folder to write into, made when missing.

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
    plain = plain_config(cfg)
    student, meta = load_student(plain, checkpoint)

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


def load_student(plain: Config, checkpoint: str) -> tuple[nn.Module, dict]:
    """Build the model of a plain config and fill it from a checkpoint, without running code.

    Returns:
        The model, in eval mode on the CPU, and the checkpoint's meta data.

    Raises:
        FileNotFoundError, ValueError: As :func:`export_student`.
    """
    scope = {'_scope_': plain.default_scope} if plain.get('default_scope') else {}
    model = build_model({**scope, **plain.model.to_dict()})
    loaded = load_weights(checkpoint)
    load_exactly(model, loaded['state_dict'], f"`checkpoint` '{checkpoint}'")
    return model.eval(), loaded['meta']


def _is_ours(node: Any) -> bool:
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
    )


def _with_test_pipeline(plain: Config) -> Config:
    """Name the test pipeline at the top, where ``mmseg.apis.inference_model`` looks for it."""
    dataset = (plain.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    named = dict(test_pipeline=dataset['pipeline']) if 'pipeline' in dataset else {}
    return Config({**named, **plain.to_dict()})


def _imports_without_us(imports: Mapping) -> dict:
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
