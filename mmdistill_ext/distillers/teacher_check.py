"""Refuses a teacher that gives no numbers, in the first step of each term."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdistill_ext.distillers.terms import FeatureTerm, HeadTerm, Term
from mmdistill_ext.taps import Call
from mmdistill_ext.units.base import Units


def check_teacher_calls(term: Term, calls: Mapping[str, Sequence[Call]]) -> None:
    """Refuse NaN in what a teacher gave; in features that are compared infinity too.

    A host sync, for the first step of a term. Boxes that a head predicts may overflow: those units
    take no part (:class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`).

    Args:
        term: The term.
        calls: Path in the teacher -> its calls.

    Raises:
        ValueError: The message names the config key, the path, and what was found.
    """
    if isinstance(term, FeatureTerm):
        tap = term.pair.teacher_tap
        _refuse(term, str(tap), tensors_in([tap.read(call) for call in calls[tap.call]]))
    for path in term.teacher_calls:
        values = tensors_in([call.output for call in calls[path]])
        _refuse(term, path, values, infinity=False)


def check_teacher_units(term: HeadTerm, units: Units) -> None:
    """Refuse logits of a teacher that are not finite, and boxes that are NaN, where units count.

    A host sync, for the first step of a term.

    Args:
        term: The term.
        units: Its units.

    Raises:
        ValueError: The message names the config key, the teacher's head, and what was found.
    """
    path = term.pair.heads[1]
    _refuse(term, path, _counted_logits(units))
    if units.boxes is not None:
        _refuse(term, path, [units.boxes.teacher], infinity=False)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of floating point in a nest of lists, tuples and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def _counted_logits(units: Units) -> list[Tensor]:
    """The teacher's logits, with zeros where a unit of the same grid is ignored."""
    if not isinstance(units.teacher, Tensor):
        return list(units.teacher)
    if units.teacher.shape[2:] != units.labels.shape[1:]:
        return [units.teacher]
    ignored = units.labels == units.ignore_index
    return [units.teacher.masked_fill(ignored.unsqueeze(1), 0)]


@torch.no_grad()
def _refuse(term: Term, path: str, values: Iterable[Tensor], infinity: bool = True) -> None:
    for value in values:
        bad = ~value.isfinite() if infinity else value.isnan()
        count = int(bad.sum())
        if count:
            key = 'teacher_tap' if isinstance(term, FeatureTerm) else 'teacher_head'
            raise ValueError(
                f'`losses.{term.name}.{key}`: a teacher should give finite numbers. Found '
                f'{value[bad][0].item()} in {count} of {value.numel()} values {tuple(value.shape)} '
                f"of '{path}' on the first batch: is `teacher.checkpoint` right, and its input "
                '(normalisation; under AMP, activations that overflow)?'
            )
