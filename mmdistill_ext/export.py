"""Ship the student: a plain config and a weights-only checkpoint, usable without this package."""

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
from mmdistill_ext.checkpoint_content import check_values
from mmdistill_ext.dataset_configs import innermost_config
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.network_scores import best_network
from mmdistill_ext.plain_config import network_names, plain_config


def export_student(
    cfg: Config | str | os.PathLike,
    checkpoint: str | os.PathLike,
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
        network: Name of one of several networks that learned together, or ``'best'``: the best at
            the checkpoint's last validation.

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
    names = network_names(cfg)
    if names and network is None:
        raise ValueError(f'`network` should be one of {", ".join(names)}, or best. Found none.')
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
    plain: Config, checkpoint: str | os.PathLike, network: str | None = None
) -> tuple[nn.Module, dict]:
    """Build the model of a plain config and fill it from a checkpoint, without running code.

    Args:
        plain: The config.
        checkpoint: File or URL.
        network: Name of one of several networks that learned together, to take its weights.

    Returns:
        The model, in eval mode on the CPU, and the checkpoint's meta data.

    Raises:
        FileNotFoundError: The checkpoint is missing.
        ValueError: The checkpoint is damaged, needs code to unpickle, or is not the student's.
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
    what = f"`checkpoint` '{checkpoint}'"
    check_values(state, what)
    load_exactly(model, state, what)
    return model.eval(), loaded['meta']


def _with_test_pipeline(plain: Config) -> Config:
    """Name the test pipeline at the top, where ``mmseg.apis.inference_model`` looks for it."""
    dataset = innermost_config((plain.get('test_dataloader') or {}).get('dataset') or {})
    named = dict(test_pipeline=dataset['pipeline']) if 'pipeline' in dataset else {}
    return Config({**named, **plain.to_dict()})


def _plain_data(value: Any) -> Any:
    """Turn arrays into lists, so that the file needs no code but PyTorch's to be read."""
    if isinstance(value, Mapping):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_data(item) for item in value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
