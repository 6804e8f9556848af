"""The second prediction that several networks make together (COL-3).

Method of CN111598182A (SenseTime), requirements COL-3 and COL-4 of the documentation; cf. KDCL,
Guo et al., CVPR 2020. Predictions are stacked, ``(N, B, C, ...)``; each function gives the logits
``(B, C, ...)`` of the second prediction or the weights that it is mixed with. Gradients flow
through the predictions and never through the choice between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmdistill_ext.functional.checks import (
    check_choice,
    check_factor,
    check_positive,
    check_same_size,
)
from mmdistill_ext.functional.choice import Choice, first_least
from mmdistill_ext.functional.logits.differences import check_difference, unit_difference
from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.functional.simplex import GRANULARITIES, simplex_weights

__all__ = [
    'error_correlation',
    'general_weights',
    'linear',
    'min_logit',
    'min_loss',
    'mix',
    'validation_weights',
]


def mix(logits: Tensor, weights: Tensor) -> Tensor:
    """``sum_n w_n logits_n``.

    Args:
        logits: ``(N, B, C, ...)``.
        weights: ``(N,)``, ``(N, B)`` or ``(N, B, ...)``, any sign.

    Returns:
        ``(B, C, ...)``.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check_stack(logits)
    shape = (len(logits), logits.shape[1], *logits.shape[3:])
    if tuple(weights.shape) not in {shape[:1], shape[:2], shape}:
        raise ValueError(
            f'`weights` should be (N,), (N, B) or (N, B, ...) of logits {tuple(logits.shape)}. '
            f'Found {tuple(weights.shape)}.'
        )
    logits = full_precision(logits)
    weights = (
        weights.detach().to(logits).reshape(*weights.shape, *[1] * (len(shape) - weights.ndim))
    )
    return (logits * weights.unsqueeze(2)).sum(0)


def min_loss(
    logits: Tensor,
    target: Tensor,
    *,
    per: str = 'unit',
    difference: str = 'ce',
    ignore_index: int = 255,
    background: bool = False,
) -> Tensor:
    """The prediction with the smallest first loss; of equal ones the first.

    Args:
        logits: ``(N, B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        per: Choose for each ``'unit'``, or for each ``'image'`` by the mean over its valid units.
        difference: The first loss, ``'ce'`` or ``'bce'``; see
            :func:`~mmdistill_ext.functional.logits.differences.unit_difference`.
        ignore_index: Label of units that are not valid.
        background: With ``'bce'``: the label ``C`` is background, as detectors have it.

    Returns:
        ``(B, C, ...)``.

    Raises:
        ValueError: On unknown kinds, or shapes and types that do not fit.

    Example:
        >>> logits = torch.tensor([[[2.0], [0.0]], [[0.0], [1.0]]]).unsqueeze(1)  # N=2, B=1, C=2
        >>> min_loss(logits, torch.tensor([[1]])).squeeze()
        tensor([0., 1.])
    """
    check_choice('per', per, GRANULARITIES)
    _check_stack(logits)
    kind = (difference, ignore_index, background)
    with torch.no_grad():
        losses = torch.stack([unit_difference(x, target, *kind) for x in logits.detach()])
        if per == 'image':  # every network has the same valid units
            losses = losses.unsqueeze(-1).flatten(2).sum(2)
        chosen = first_least(losses)
    if per == 'image':
        return full_precision(logits[chosen, torch.arange(len(chosen), device=chosen.device)])
    return Choice.apply(full_precision(logits), chosen.unsqueeze(1))


def linear(
    logits: Tensor,
    target: Tensor,
    *,
    per: str = 'unit',
    difference: str = 'ce',
    ignore_index: int = 255,
    background: bool = False,
    iterations: int = 20,
) -> Tensor:
    """Weighted sum whose weights on the simplex minimise its own loss.

    Arguments, shapes and errors as those of :func:`min_loss`; for the weights and ``iterations``
    see :func:`~mmdistill_ext.functional.simplex.simplex_weights`.
    """
    found = simplex_weights(
        logits,
        target,
        per=per,
        difference=difference,
        ignore_index=ignore_index,
        background=background,
        iterations=iterations,
    )
    return mix(logits, found.weights)


def min_logit(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    ignore_index: int = 255,
) -> Tensor:
    """The smallest logit of each class; of equal ones the first.

    With labels the logits are shifted first, so that the label's is 0 in every network (KDCL); a
    softmax does not change by that. On units that are not valid nothing is shifted.

    Args:
        logits: ``(N, B, C, ...)``; of a softmax when shifted.
        target: ``(B, ...)``, class indices or ``ignore_index``; None: no shift.
        ignore_index: Label of units that are not valid.

    Returns:
        ``(B, C, ...)``.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    _check_stack(logits)
    logits = full_precision(logits)
    if target is not None:
        check_same_size('logits', logits[0], target)
        check_difference('ce', logits.shape[2])
        valid = (target != ignore_index).unsqueeze(1)
        label = target.long().unsqueeze(1).where(valid, 0)
        at_label = logits.gather(2, label.expand(len(logits), *label.shape))
        logits = logits - at_label.where(valid, 0)
    return Choice.apply(logits, first_least(logits.detach()))


def validation_weights(scores: Sequence[float], temperature: float = 0.1) -> Tensor:
    """Weights that grow with each network's score: ``softmax(score / temperature)`` (ours).

    Args:
        scores: Validation metric of each network, the larger the better.
        temperature: > 0, in the metric's unit; the smaller, the more the best network counts.

    Returns:
        ``(N,)``, > 0 (or 0 by rounding), sum 1.

    Raises:
        ValueError: There are no scores, one is not finite, or the temperature is not above 0.
    """
    check_positive('temperature', temperature)
    values = [float(score) for score in scores]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f'`scores` should be finite numbers, one per network. Found {values}.')
    return (torch.tensor(values, dtype=torch.float64) / temperature).softmax(0).float()


def error_correlation(
    logits: Tensor,
    target: Tensor,
    *,
    difference: str = 'ce',
    ignore_index: int = 255,
    background: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums for the correlation of the networks' errors (KDCL).

    The error is ``softmax(logits) - onehot(target)``, or with ``'bce'`` that of the sigmoid.

    Args:
        logits: ``(N, B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        difference: ``'ce'`` or ``'bce'``; see
            :func:`~mmdistill_ext.functional.logits.differences.unit_difference`.
        ignore_index: Label of units that are not valid.
        background: With ``'bce'``: the label ``C`` is background, as detectors have it.

    Returns:
        ``(N, N)``, the sum over valid units and classes of the products of errors, and the
        number of valid units, both float64, to be added up over batches and processes.

    Raises:
        ValueError: Shapes, types or kinds do not fit.
    """
    _check_stack(logits)
    channels = logits.shape[2]
    check_same_size('logits', logits[0], target)
    check_difference(difference, channels, background)
    with torch.no_grad():
        valid = (target != ignore_index).unsqueeze(1)
        classes = torch.arange(channels, device=target.device)
        if channels == 1 and not background:
            classes = classes + 1  # the channel is that of the foreground
        truth = target.unsqueeze(1) == classes.view(-1, *[1] * (target.ndim - 1))
        logits = full_precision(logits)
        errors = (logits.softmax(2) if difference == 'ce' else logits.sigmoid()) - truth.to(logits)
        errors = errors.where(valid, 0).flatten(1).double()
        return errors @ errors.T, valid.sum().double()


def general_weights(correlation: Tensor, ridge: float = 1e-6) -> tuple[Tensor, float]:
    """KDCL-General: ``C^-1 1 / (1^T C^-1 1)``, the weights of the least expected error.

    Weights may be negative. Networks that err alike make the matrix ill-conditioned: ``ridge``
    times its mean diagonal is added to the diagonal, which draws the weights to equal ones.

    Args:
        correlation: ``(N, N)``, symmetric, positive semidefinite, of any scale.
        ridge: >= 0.

    Returns:
        ``(N,)``, sum 1, and the condition number of the matrix before the ridge.

    Raises:
        ValueError: The matrix is not square, not finite, or 0.

    Example:
        >>> general_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), ridge=0.0)[0]
        tensor([0.7500, 0.2500])
    """
    matrix = correlation.double()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f'`correlation` should be (N, N). Found {tuple(correlation.shape)}.')
    check_factor('ridge', ridge)
    scale = matrix.diagonal().mean()
    if not torch.isfinite(matrix).all() or scale <= 0:
        raise ValueError(
            '`correlation` should be finite and its diagonal above 0. '
            f'Found {correlation.tolist()}.'
        )
    matrix = (matrix + matrix.T) / (2 * scale)
    condition = torch.linalg.cond(matrix).item()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    solved = torch.linalg.lstsq(matrix + ridge * eye, matrix.new_ones(len(matrix), 1)).solution
    return (solved / solved.sum()).squeeze(1).float(), condition


def _check_stack(logits: Tensor) -> None:
    if logits.ndim < 3 or not len(logits):
        raise ValueError(
            '`logits` should be those of N >= 1 networks, (N, B, C, ...). Found shape '
            f'{tuple(logits.shape)}.'
        )
