"""Plots of a run, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdistill_ext.checkpoint import write_atomic

COLORS = dict(train='#0072b2', val='#d55e00', error='#444444', weight='#009e73', share='#999999')


def plot_fit(history: Sequence[dict[str, float]], path: str | os.PathLike) -> np.ndarray:
    """Draw the GT losses, the fitting error x and F(x) over the iterations (FIT-7).

    Args:
        history: One dict per measurement: ``iter``, and those of ``train_gt_loss``,
            ``train_gt_loss_eval``, ``val_gt_loss``, ``error``, ``weight`` and ``simple_share`` that
            were known.
        path: PNG file to write; the whole file or none.

    Returns:
        The picture, RGB ``(H, W, 3)`` uint8.
    """
    figure = Figure(figsize=(7, 6), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    losses, error, weight = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    draw_losses(losses, history)
    _line(error, history, 'error', COLORS['error'], 'x = train - validation')
    error.axhline(0, color='#bbbbbb', lw=1)
    _line(weight, history, 'weight', COLORS['weight'], 'F(x), weight of hard samples')
    _line(weight, history, 'simple_share', COLORS['share'], 'share of simple samples')
    weight.set(xlabel='iteration', ylim=(0, None))
    for axes in (losses, error, weight):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc='best', fontsize=8, frameon=False)
        axes.grid(color='#eeeeee')
        axes.spines[['top', 'right']].set_visible(False)
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


def _line(axes: Axes, history: Sequence[dict], key: str, color: str, label: str, ls='-') -> None:
    rows = [(row['iter'], row[key]) for row in history if key in row]
    if rows:
        marker = 'o' if len(rows) < 20 else None
        axes.plot(*zip(*rows, strict=True), color=color, label=label, ls=ls, marker=marker, ms=3)
