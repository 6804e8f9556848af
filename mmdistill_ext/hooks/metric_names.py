"""The names of the metrics that a validation will give, as far as they are known beforehand."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.runner import Runner

from mmdistill_ext.evaluation import NetworksEvaluator
from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.losses.collaboration_loss import ENSEMBLE

OF_IOU = dict(
    mIoU=('aAcc', 'mIoU', 'mAcc'),
    mDice=('aAcc', 'mDice', 'mAcc'),
    mFscore=('aAcc', 'mFscore', 'mPrecision', 'mRecall'),
)
OF_COCO = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
SPECIAL = ('auto', None)


def known_names(metric: Any) -> set[str] | None:
    """Names that a metric of an evaluator gives, with its prefix.

    Args:
        metric: mmseg's ``IoUMetric`` and mmdet's ``CocoMetric`` say beforehand what they give.

    Returns:
        None for any other metric, and where the config asks for more than the usual names.

    Raises:
        ValueError: ``IoUMetric`` does not know a metric that it should give.
    """
    names: set[str] | None = None
    bases = {base.__name__ for base in type(metric).__mro__}
    if 'IoUMetric' in bases:
        for kind in metric.metrics:
            check_choice('val_evaluator.iou_metrics', kind, tuple(OF_IOU))
        names = {name for kind in metric.metrics for name in OF_IOU[kind]}
    elif 'CocoMetric' in bases and has_usual_names(metric):
        names = {f'{kind}_{name}' for kind in metric.metrics for name in OF_COCO}
    if names is None or not metric.prefix:
        return names
    return {f'{metric.prefix}/{name}' for name in names}


def has_usual_names(metric: Any) -> bool:
    """Whether a ``CocoMetric`` gives the usual names, and no more."""
    usual = set(metric.metrics) <= {'bbox', 'segm'}
    return usual and not (metric.classwise or metric.metric_items or metric.format_only)


def names_of_evaluator(evaluator: Any) -> set[str] | None:
    """Names that all metrics of an evaluator give; None if one of them is not known."""
    names: set[str] = set()
    for metric in getattr(evaluator, 'metrics', ()):
        known = known_names(metric)
        if known is None:
            return None
        names |= known
    return names or None


def check_metric(key: str, name: str, known: set[str] | None) -> None:
    """Refuse a metric that no validation will give.

    Raises:
        ValueError: The message names the key, and what there is.
    """
    if known is None or name in known:
        return
    near = get_close_matches(name, known, 1)
    raise ValueError(
        f"`{key}` should be a metric of the validation: {', '.join(sorted(known))}. Found '{name}'"
        f'{f": is it {near[0]!r}?" if near else "."}'
    )


def check_saving(hook: CheckpointHook) -> None:
    """Refuse arguments that mmengine's hook hands on, unseen until the first checkpoint.

    Raises:
        ValueError: ``Runner.save_checkpoint`` has no such argument.
    """
    known = [*inspect.signature(Runner.save_checkpoint).parameters][1:]
    for unknown in (name for name in hook.args if name not in known):
        near = get_close_matches(unknown, inspect.signature(CheckpointHook).parameters, 1)
        raise ValueError(
            f'`default_hooks.checkpoint.{unknown}` should be an argument of CheckpointHook. Found '
            f'{hook.args[unknown]!r}{f": is it `{near[0]}`?" if near else "."}'
        )


def check_monitored(runner: Runner, networks: Sequence[str] = ()) -> None:
    """Refuse ``save_best`` and ``monitor`` of mmengine's hooks that no validation will give.

    Args:
        runner: A run whose validation is built.
        networks: The names of several networks that are evaluated by a ``NetworksEvaluator``.

    Raises:
        ValueError: A name is that of no metric.
    """
    evaluator = getattr(runner.val_loop, 'evaluator', None)
    known = names_of_evaluator(evaluator)
    if known is not None and isinstance(evaluator, NetworksEvaluator):
        if not networks:
            return
        known = {f'{name}/{metric}' for name in (*networks, ENSEMBLE) for metric in known}
    for hook in runner.hooks:
        best = None
        if isinstance(hook, CheckpointHook):
            check_saving(hook)
            best = hook.save_best
        for name in [best] if isinstance(best, str) else best or ():
            if name not in SPECIAL:
                check_metric('default_hooks.checkpoint.save_best', name, known)
        if isinstance(hook, EarlyStoppingHook):
            check_metric('EarlyStoppingHook.monitor', hook.monitor, known)
