"""From the config key ``losses`` to terms."""

from __future__ import annotations

from torch import nn

from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.distillers.tapped_forward import tapped_forward
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.distillers.terms import FeatureTerm, HeadTerm, Term
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.tap_paths import find_tap
from mmdistill_ext.units.features.location_weights import LocationWeights
from mmdistill_ext.units.features.pair import FeaturePair
from mmdistill_ext.units.features.probe import Probe, dry_batch, dry_sizes, probe
from mmdistill_ext.units.pairing import pair_heads

SCHEDULE = ('weight', 'begin', 'warmup', 'stop')
OF_HEADS = ('head', 'teacher_head')
OF_FEATURES = ('tap', 'teacher_tap', 'connector', 'grid', 'weight_by')


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
    if not losses:
        raise ValueError('`losses` should name at least one loss. Found none.')
    terms = [_build_term(student, teacher, name, cfg, fuse) for name, cfg in losses.items()]
    if fuse:
        _check_own_losses(terms, fuse)
    _match_features([term for term in terms if isinstance(term, FeatureTerm)], student, teacher)
    return terms


def _build_term(
    student: nn.Module, teacher: Teacher, name: str, cfg: dict, fuse: str | None
) -> Term:
    key, cfg = f'losses.{name}', dict(cfg)
    if not isinstance(name, str) or not name or '.' in name:
        raise ValueError(f'`losses` should have names without a dot. Found {name!r}.')
    schedule = Schedule(**_take(cfg, SCHEDULE), key=key)
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
        features = _feature_pair(student, teacher, loss, key, **of_features)
        return FeatureTerm(name, loss, schedule, features)
    pair = pair_heads(
        student, teacher.model, of_heads.get('head'), of_heads.get('teacher_head'), key
    )
    try:
        loss.check(pair)
    except ValueError as error:
        raise ValueError(f'`{key}`: {error}') from error
    fused = pair.fused_loss(fuse) if fuse and loss.forms_own_loss else None
    return HeadTerm(name, loss, schedule, pair, fused)


def _take(cfg: dict, keys: tuple[str, ...]) -> dict:
    return {key: cfg.pop(key) for key in keys if key in cfg}


def _build_loss(cfg: dict, key: str) -> DistillLoss:
    """Build the loss itself; ``ValueError`` if it is none, or its arguments are wrong."""
    cfg.setdefault('_scope_', MODELS.scope)
    try:
        loss = MODELS.build(cfg)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f'`{key}`: {error}') from error
    if not isinstance(loss, DistillLoss):
        raise ValueError(
            f'`{key}` should be a loss between student and teacher, a subclass of '
            f'`mmdistill_ext.losses.base.DistillLoss`. Found a {type(loss).__name__}.'
        )
    return loss


def _feature_pair(
    student: nn.Module,
    teacher: Teacher,
    loss: DistillLoss,
    key: str,
    tap: str | None = None,
    teacher_tap: str | None = None,
    connector: dict | list[dict] | None = None,
    grid: str = 'student',
    weight_by: str | None = None,
) -> FeaturePair:
    mine = find_tap(student, tap, f'{key}.tap')
    same = teacher_tap is None
    theirs = find_tap(teacher.model, tap if same else teacher_tap, f'{key}.teacher_tap')
    teacher.check_tap(theirs, f'{key}.teacher_tap')
    weights = LocationWeights(weight_by, student, teacher.model, f'{key}.weight_by')
    return FeaturePair(
        mine, theirs, connector, grid, weights, teacher.input.patches, loss.any_channels, key
    )


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
    return (
        probe(
            student,
            lambda paths: tapped_forward(student, inputs, samples, paths),
            [term.pair.tap.call for term in terms],
            size,
            'student',
        ),
        probe(
            teacher.model,
            lambda paths: teacher.calls(inputs, samples, paths),
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
