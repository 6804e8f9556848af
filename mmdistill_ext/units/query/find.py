"""Which heads predict by queries, and which of them can be compared object by object."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

import mmdistill_ext.units.query.families  # noqa: F401  (registers mmdet's)
from mmdistill_ext.taps import resolve
from mmdistill_ext.units.detector_pair import FEATURES_INSTEAD
from mmdistill_ext.units.query.family import QUERY_FAMILIES, QueryFamily

RULES = {
    'num_classes': 'the same `num_classes`',
    'sigmoid': 'both sigmoid or both softmax scores: DETR pairs with DETR, the others with each '
    'other',
}
"""Attribute of a family -> what the error says when it differs."""


def find_queries(model: nn.Module, path: str, key: str) -> QueryFamily:
    """The family of the head at a path; of stages, the last one, which predicts.

    Raises:
        ValueError: The path leads nowhere, or to something that no family reads.
    """
    head, method = resolve(model, path, key)
    if isinstance(head, nn.ModuleList):  # stages of Sparse R-CNN
        path, head = f'{path}.{len(head) - 1}', head[-1]
    family = QUERY_FAMILIES.find(head) if method == 'forward' else None
    family = QUERY_FAMILIES.find(head, family.loss_methods) if family else None
    if family is None or not family.fits(model):
        raise ValueError(
            f'`{key}` should lead to the head of a DETR, Deformable DETR, DINO, DDQ or Sparse '
            f"R-CNN, or to a subclass with their matching and loss. Found '{path}', a "
            f'{type(head).__name__}. {FEATURES_INSTEAD}'
        )
    found = family(model, path, head)
    if not found.has_assigner:
        raise ValueError(
            f"`{key}` should lead to a head that can match queries: the model's config should have "
            f"`{family.assigner_key}`. Found none for '{path}'."
        )
    return found


def check_alike(heads: Mapping[str, QueryFamily], who: str, key: str) -> None:
    """Check that heads predict the same classes, in the same way (SEL-7, COL-8).

    Args:
        heads: Name of a head, for errors -> its family.
        who: Whose heads these are, such as ``'Student and teacher'``.
        key: The config key to name in errors.

    Raises:
        ValueError: They differ; the message says in what.
    """
    for attribute, rule in RULES.items():
        values = {name: getattr(family, attribute) for name, family in heads.items()}
        if len(set(values.values())) > 1:
            parts = ', '.join(f'{value} in {name}' for name, value in values.items())
            raise ValueError(f'{who} should have {rule} (`{key}`). Found {parts}.')
