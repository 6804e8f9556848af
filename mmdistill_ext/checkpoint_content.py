"""What a checkpoint has to be, once it is unpickled; damaged ones are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

AGAIN = 'Save it again, from the model that it was made of.'


def check_content(content: Any, key: str, source: str, weights: bool = False) -> None:
    """Refuse what no framework could load, or would load as something else.

    Args:
        content: What was unpickled.
        key: The config key to name in errors.
        source: The file or URL that it names.
        weights: Ask for a state dict of a model and for its meta data; else any content may be
            there, but a ``state_dict`` has to be one.

    Raises:
        ValueError: Says what is wrong.
    """
    has_state = isinstance(content, Mapping) and 'state_dict' in content
    state = content['state_dict'] if has_state else content
    if not (weights or has_state):
        return
    what = f"`{key}` should hold a state dict of tensors. '{source}'"
    if not isinstance(state, Mapping):
        raise ValueError(f'{what} holds a {type(state).__name__}. {AGAIN}')
    if not state:
        raise ValueError(f'{what} holds an empty one. {AGAIN}')
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{what} has the name {name!r}, which is no text. {AGAIN}')
        if isinstance(value, Tensor):
            _check_dense(value, f"{what} has '{name}'")
        elif weights:
            raise ValueError(f"{what} has '{name}', a {type(value).__name__}. {AGAIN}")
    if weights and has_state:
        _check_meta(content.get('meta'), f"`{key}` '{source}'")


def check_values(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are NaN or infinite, and negative variances.

    Args:
        state: Name -> weight.
        what: What they are, for errors.

    Raises:
        ValueError: Names the first such weight.
    """
    for name, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        value = value.float() if value.element_size() == 1 else value  # 8 bits have no isfinite
        if not value.isfinite().all():
            raise ValueError(
                f"{what} should have finite weights. Found NaN or infinite values in '{name}': its "
                'training diverged. Take an earlier checkpoint.'
            )
        if name.endswith('running_var') and (value < 0).any():
            raise ValueError(
                f"{what} should have variances >= 0. Found {value.min():.3g} in '{name}': the file "
                'is damaged. Copy or save it again.'
            )


def classes_of(meta: Mapping) -> tuple[str, ...] | None:
    """Names of the classes that a model was trained on, None when its meta data have none."""
    dataset_meta = {k.lower(): v for k, v in (meta.get('dataset_meta') or {}).items()}
    classes = dataset_meta.get('classes', meta.get('CLASSES'))
    if isinstance(classes, str):
        return (classes,)
    return tuple(map(str, classes)) if classes is not None and len(classes) else None


def _check_dense(value: Tensor, what: str) -> None:
    kinds = dict(
        quantised=value.is_quantized,
        sparse=not value.is_quantized and value.layout != torch.strided,
        nested=value.is_nested,
        meta=value.is_meta,
    )
    for kind, is_so in kinds.items():
        if is_so:
            advice = 'it has no values' if kind == 'meta' else 'save it as a dense tensor of floats'
            raise ValueError(f'{what}, a {kind} tensor: {advice}.')


def _check_meta(meta: Any, what: str) -> None:
    """Meta data are a dict, or missing; what this package reads in it has its types."""
    if meta is None:
        return
    rules: dict[str, tuple[Any, Any, str]] = {
        'meta': (meta, Mapping, 'a dict'),
        'meta.dataset_meta': (_get(meta, 'dataset_meta'), Mapping, 'a dict'),
        'meta.CLASSES': (_get(meta, 'CLASSES'), (list, tuple, str), 'a list of names'),
        'meta.epoch': (_get(meta, 'epoch'), int, 'an integer'),
        'meta.iter': (_get(meta, 'iter'), int, 'an integer'),
    }
    dataset_meta = _get(meta, 'dataset_meta')
    if isinstance(dataset_meta, Mapping):
        for name in dataset_meta:
            rules[f'name in meta.dataset_meta {name!r}'] = (name, str, 'text')
            if str(name).lower() == 'classes':
                classes = dataset_meta[name]
                rules[f'meta.dataset_meta.{name}'] = (classes, (list, tuple, str), 'names')
    for place, (value, types, rule) in rules.items():
        if value is not None and not isinstance(value, types):
            raise ValueError(f'{what}: `{place}` should be {rule}. Found {value!r}. {AGAIN}')


def _get(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, Mapping) else None
