"""Plots of a run, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdistill_ext.checkpoint import write_atomic

COLORS = dict(train='#0072b2', val='#d55e00', error='#444444', weight='#009e73', share='#999999')


def plot_fit(history: Sequence[dict[str, float]], path: str | os.PathLike) -> np.ndarray:
    """Draw the GT losses, the fitting error x and F(x) over the iterations (FIT-7).

    Args:
        history: One dict per measurement: ``iter`` and, where they were known,
            ``train_gt_loss``, ``train_gt_loss_eval``, ``val_gt_loss``, ``error``, ``weight`` and
            ``simple_share``.
        path: PNG file to write; the whole file or none.

    Returns:
        The picture, RGB ``(H, W, 3)`` uint8.
    """
    figure = Figure(figsize=(7, 6), dpi=100, layout='constrained')
    losses, error, weight = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    draw_losses(losses, history)
    _line(error, history, 'error', COLORS['error'], 'x = train - validation')
    error.axhline(0, color='#bbbbbb', lw=1)
    _line(weight, history, 'weight', COLORS['weight'], 'F(x), weight of hard samples')
    _line(weight, history, 'simple_share', COLORS['share'], 'share of simple samples')
    weight.set(xlabel='iteration', ylim=(0, None))
    return _finish(figure, (losses, error, weight), path)


def plot_networks(history: Mapping[int, Mapping], path: str | os.PathLike) -> np.ndarray:
    """Draw every network's metric, the ensemble's, and the networks' weights (COL-7).

    Args:
        history: Iteration -> ``metric``, ``scores`` (name -> value or None) and ``weights``.
        path: PNG file to write; the whole file or none.

    Returns:
        The picture, RGB ``(H, W, 3)`` uint8.
    """
    figure = Figure(figsize=(7, 5), dpi=100, layout='constrained')
    scores, weights = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    last = history[max(history)]
    for place, name in enumerate(last['scores']):
        is_network = name in last['weights']
        look = dict(color=f'C{place}') if is_network else dict(color='#444444', ls='--')
        for axes, key in ((scores, 'scores'), (weights, 'weights')):
            known = {at: history[at][key].get(name) for at in sorted(history)}
            known = {at: value for at, value in known.items() if value is not None}
            if known:
                axes.plot(list(known), list(known.values()), label=name, marker='o', ms=3, **look)
    scores.set(ylabel=last['metric'])
    weights.set(ylabel='weight', xlabel='iteration')
    return _finish(figure, (scores, weights), path)


def _finish(figure: Figure, panels: Sequence[Axes], path: str | os.PathLike) -> np.ndarray:
    """Add legends and grids to the panels, write the picture and return it."""
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc='best', fontsize=8, frameon=False)
        axes.grid(color='#eeeeee')
        axes.spines[['top', 'right']].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_atomic(path, lambda file: figure.savefig(file, format='png'))
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_losses(axes: Axes, history: Sequence[dict[str, float]]) -> None:
    """Draw the GT losses into the axes."""
    _line(axes, history, 'train_gt_loss', COLORS['train'], 'training, as trained')
    _line(axes, history, 'train_gt_loss_eval', COLORS['train'], 'training, eval mode', ls='--')
    _line(axes, history, 'val_gt_loss', COLORS['val'], 'validation, eval mode')
    axes.margins(y=0.1)
    axes.set(ylabel='GT loss per unit', ylim=(0, None))


def _line(
    axes: Axes, history: Sequence[dict], key: str, color: str, label: str, ls: str = '-'
) -> None:
    rows = [(row['iter'], row[key]) for row in history if key in row]
    if rows:
        marker = 'o' if len(rows) < 20 else None
        axes.plot(*zip(*rows, strict=True), color=color, label=label, ls=ls, marker=marker, ms=3)
