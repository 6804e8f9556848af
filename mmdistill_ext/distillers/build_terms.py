"""From the config key ``losses`` to terms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from mmdistill_ext.arguments import check_arguments, shown
from mmdistill_ext.distillers.schedule import build_schedule
from mmdistill_ext.distillers.tapped_forward import features_in_training, tapped_forward
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.distillers.terms import FeatureTerm, HeadTerm, Term
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.tap_paths import find_tap
from mmdistill_ext.taps import Call
from mmdistill_ext.units.features.location_weights import LocationWeights
from mmdistill_ext.units.features.pair import FeaturePair
from mmdistill_ext.units.features.probe import Probe, dry_batch, dry_sizes, probe
from mmdistill_ext.units.pairing import pair_heads


@dataclass(frozen=True)
class HeadKeys:
    """What the config of a loss of units says of heads."""

    head: str | None = None
    teacher_head: str | None = None


@dataclass(frozen=True)
class FeatureKeys:
    """What the config of a loss of features says of taps."""

    tap: str | None = None
    teacher_tap: str | None = None
    connector: dict | list[dict] | None = None
    grid: str = 'student'
    weight_by: str | None = None


SCHEDULE = ('weight', 'begin', 'warmup', 'stop')
OF_HEADS = tuple(part.name for part in fields(HeadKeys))
OF_FEATURES = tuple(part.name for part in fields(FeatureKeys))


def build_terms(
    student: nn.Module, teacher: Teacher, losses: dict, fuse: str | None = None
) -> list[Term]:
    """Build the terms of a distillation.

    Args:
        student: The built student.
        teacher: The teacher.
        losses: Name -> config of a loss. Every one may have ``weight``, ``begin``, ``warmup`` and
            ``stop`` (see :class:`Schedule`); those of heads ``head`` and ``teacher_head``; those of
            features ``tap``, ``teacher_tap``, ``connector``, ``grid`` and ``weight_by`` (see
            :class:`FeaturePair`).
        fuse: The config key that asks for terms that form the heads' own losses; None without one.

    Raises:
        ValueError: The message names the key ``losses.<name>``.
    """
    if not losses or not isinstance(losses, dict):
        raise ValueError(
            "`losses` should name at least one loss, such as dict(kd=dict(type='KDLoss')). "
            f'Found {shown(losses)}.'
        )
    _check_names(losses)
    in_order = sorted(losses.items())  # by name: the order of a config's keys means nothing
    terms = [_build_term(student, teacher, name, cfg, fuse) for name, cfg in in_order]
    if fuse:
        _check_own_losses(terms, fuse)
    _match_features([term for term in terms if isinstance(term, FeatureTerm)], student, teacher)
    return terms


def _check_names(losses: dict) -> None:
    for name in losses:
        if not isinstance(name, str) or not name or '.' in name:
            raise ValueError(f'`losses` should have names without a dot. Found {name!r}.')


def _build_term(
    student: nn.Module, teacher: Teacher, name: str, cfg: dict, fuse: str | None
) -> Term:
    key = f'losses.{name}'
    cfg = dict(cfg) if isinstance(cfg, dict) else cfg
    schedule = build_schedule(_take(cfg, SCHEDULE), key)
    of_heads, of_features = _take(cfg, OF_HEADS), _take(cfg, OF_FEATURES)
    loss = _build_loss(cfg, key)
    allowed, other = ('tap', of_heads) if loss.takes_features else ('head', of_features)
    if other:
        raise ValueError(
            f'`{key}` should have `{allowed}` and what belongs to it: {type(loss).__name__} is of '
            f'{"features" if loss.takes_features else "units of heads"}. Found '
            f'{", ".join(map(repr, other))}.'
        )
    if loss.takes_features:
        check_arguments(FeatureKeys, of_features, key)
        features = _feature_pair(student, teacher, loss, key, FeatureKeys(**of_features))
        return FeatureTerm(name, loss, schedule, features)
    check_arguments(HeadKeys, of_heads, key)
    heads = HeadKeys(**of_heads)
    pair = pair_heads(student, teacher.model, heads.head, heads.teacher_head, key)
    try:
        loss.check(pair)
    except ValueError as error:
        raise ValueError(f'`{key}`: {error}') from error
    fused = pair.fused_loss(fuse) if fuse and loss.forms_own_loss else None
    return HeadTerm(name, loss, schedule, pair, fused)


def _take(cfg: Any, keys: tuple[str, ...]) -> dict:
    """Take a term's own keys out of its config; what is no config has none."""
    return {key: cfg.pop(key) for key in keys if key in cfg} if isinstance(cfg, dict) else {}


def _build_loss(cfg: Any, key: str) -> DistillLoss:
    """Build the loss itself; ``ValueError`` if it is none, or its arguments are wrong."""
    loss = MODELS.build_part(cfg, key, 'KDLoss')
    if not isinstance(loss, DistillLoss):
        raise ValueError(
            f'`{key}` should be a loss between student and teacher, a subclass of '
            f'`mmdistill_ext.losses.base.DistillLoss`. Found a {type(loss).__name__}.'
        )
    return loss


def _feature_pair(
    student: nn.Module, teacher: Teacher, loss: DistillLoss, key: str, keys: FeatureKeys
) -> FeaturePair:
    mine = find_tap(student, keys.tap, f'{key}.tap')
    other = keys.tap if keys.teacher_tap is None else keys.teacher_tap
    theirs = find_tap(teacher.model, other, f'{key}.teacher_tap')
    teacher.check_tap(theirs, f'{key}.teacher_tap')
    weights = LocationWeights(keys.weight_by, student, teacher.model, f'{key}.weight_by')
    patches, any_channels = teacher.input.patches, loss.any_channels
    return FeaturePair(mine, theirs, keys.connector, keys.grid, weights, patches, any_channels, key)


def _match_features(terms: list[FeatureTerm], student: nn.Module, teacher: Teacher) -> None:
    """Size the connectors of all terms by one dry forward of either model."""
    if not terms:
        return
    *small, last = dry_sizes(student)
    for size in small:
        try:
            probes = _probe_both(terms, student, teacher, size)
            break
        except ValueError:  # a model that takes one size only
            continue
    else:
        probes = _probe_both(terms, student, teacher, last)
    for term in terms:
        term.pair.match(*probes)


def _probe_both(
    terms: list[FeatureTerm], student: nn.Module, teacher: Teacher, size: tuple[int, int]
) -> tuple[Probe, Probe]:
    inputs, samples = dry_batch(student, size)

    def student_forward(paths: dict[str, int | None]) -> dict[str, list[Call]]:
        with features_in_training(student):  # which its head may not take while it predicts
            return tapped_forward(student, inputs, samples, paths, to_the_end=False)

    return (
        probe(
            student,
            student_forward,
            [term.pair.tap.call for term in terms],
            size,
            'student',
        ),
        probe(
            teacher.model,
            lambda paths: teacher.calls(inputs, samples, paths, to_the_end=False),
            [term.pair.teacher_tap.call for term in terms],
            size,
            'teacher',
        ),
    )


def _check_own_losses(terms: list[Term], key: str) -> None:
    """Refuse a head whose own loss should be formed by a term, when no term on it can."""
    heads: dict[str, list[HeadTerm]] = {}
    for term in terms:
        if isinstance(term, HeadTerm):
            heads.setdefault(term.pair.heads[0], []).append(term)
    for head, own in heads.items():
        if not any(term.loss.forms_own_loss for term in own):
            found = ', '.join(f'losses.{t.name} ({type(t.loss).__name__})' for t in own)
            raise ValueError(
                f"`{key}` needs a loss on '{head}' that can form or split the head's own loss, as "
                f'KDLoss and SelectiveLoss do. Found only {found}.'
            )
    if not heads:
        raise ValueError(f'`{key}` needs one of the `losses` on a head. Found losses of features.')
