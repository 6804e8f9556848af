"""Which single-stage heads can be compared location by location."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import nn

import mmdistill_ext.units.dense.families  # noqa: F401  (registers mmdet's)
from mmdistill_ext.taps import resolve
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily

RULES = {
    'num_classes': 'the same `num_classes`',
    'has_boxes': 'both boxes or both none',
    'sigmoid': 'both sigmoid or both softmax scores',
    'priors_per_location': 'as many priors per location: heads with one (ATSS, FCOS, GFL, ...) '
    'pair among each other, those with several (RetinaNet, FreeAnchor, ...) if their anchors are '
    'the same',
}
"""Attribute of a family -> what the error says when it differs."""


def find_family(model: nn.Module, path: str, key: str) -> DenseFamily:
    """The family of the single-stage head at a path.

    Raises:
        ValueError: The path leads nowhere, or to something that no family reads.
    """
    head, method = resolve(model, path, key)
    family = DENSE_FAMILIES.find(head) if method == 'forward' else None
    if family is None:
        raise ValueError(
            f'`{key}` should lead to one of {DENSE_FAMILIES}, or to a subclass with their target '
            f"assignment and loss. Found '{path}', a {type(head).__name__}. A loss of features, "
            "such as `dict(type='FeatureLoss', tap='neck')`, takes any head."
        )
    return family


def common_levels(heads: Mapping[str, DenseFamily], who: str, key: str) -> list[list[int]]:
    """Check that heads predict for the same units (SEL-7, COL-8).

    Args:
        heads: Name of a head, for errors, such as ``"the student's ATSSHead"`` -> its family. The
            first assigns the targets.
        who: Whose heads these are, such as ``'Student and teacher'``.
        key: The config key to name in errors.

    Returns:
        For each head the indices of its levels whose stride all heads have, in the order of the
        first head's levels.

    Raises:
        ValueError: The heads predict for different units; the message says why and what would fit.
    """
    (lead_name, lead), *others = heads.items()
    if lead.needs_assigner and not hasattr(lead.head, lead.assigner):
        raise ValueError(
            f'The labels come from {lead_name}, which should have an assigner (`{key}`): its '
            'config needs `train_cfg`. Found none.'
        )

    def refuse(rule: str, values: Mapping[str, object]) -> NoReturn:
        parts = ', '.join(f'{value} in {name}' for name, value in values.items())
        raise ValueError(f'{who} should have {rule} (`{key}`). Found {parts}.')

    for attribute, rule in RULES.items():
        values = {name: getattr(family, attribute) for name, family in heads.items()}
        different = {frozenset(v) if isinstance(v, list) else v for v in values.values()}
        if len(different) > 1:
            refuse(rule, values)
    strides = {name: family.strides for name, family in heads.items()}
    common = [stride for stride in lead.strides if all(stride in x for x in strides.values())]
    if not common:
        refuse('at least one level of the same stride', strides)
    places = [[own.index(stride) for stride in common] for own in strides.values()]
    if lead.priors_per_location[0] > 1:
        for (name, family), levels in zip(others, places[1:], strict=True):
            differ = _differing_anchors((lead, family), (places[0], levels))
            if differ is not None:
                refuse('the same anchors', dict(zip((lead_name, name), differ, strict=True)))
    return places


def _differing_anchors(
    pair: Sequence[DenseFamily], places: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]] | None:
    """The first anchor that differs, as each of two heads has it; None if all are the same."""
    own, other = (family.base_anchors(levels) for family, levels in zip(pair, places, strict=True))
    differs = (own != other).any(1)
    return (own[differs][0].tolist(), other[differs][0].tolist()) if differs.any() else None
