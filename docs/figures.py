"""Draws the pictures in docs/images/: python docs/figures.py."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mmdistill_ext.functional import exponential_fit, logistic_fit
from mmdistill_ext.visualization.curves import COLORS

ROOT = Path(__file__).resolve().parent.parent
matplotlib.rcParams['svg.hashsalt'] = 'mmdistill_ext'  # the same file every time
matplotlib.rcParams['font.size'] = 9


def fit_functions() -> Figure:
    """F over x for every evaluation function."""
    figure = Figure(figsize=(6, 3.2), layout='constrained')
    axes = figure.subplots()
    x = np.linspace(-1.5, 1, 501)
    for b, style in ((2.0, ':'), (10.0, '-'), (100.0, '--')):
        exponential = [exponential_fit(float(value), b) for value in x]
        logistic = [logistic_fit(float(value), b) for value in x]
        axes.plot(x, exponential, style, color='#d55e00', label=f'ExponentialFit, b={b:g}')
        axes.plot(x, logistic, style, color='#0072b2', label=f'LogisticFit, b={b:g}')
    axes.axhline(1, color='#999999', lw=1, label='ConstantFit, c=1: plain distillation')
    axes.axvline(0, color='#dddddd', lw=1, zorder=0)
    axes.set(xlabel='x = training loss - validation loss', ylabel='F(x)', ylim=(0, 2.1))
    axes.annotate('overfitting', (-1.45, 1.85), color='#666666')
    axes.legend(fontsize=7, frameon=False, loc='upper left', bbox_to_anchor=(1.0, 1.0))
    axes.spines[['top', 'right']].set_visible(False)
    return figure


def fit_camvid13() -> Figure:
    """The GT losses, x and F(x) of the runs on thirteen images, seed by seed."""
    scores = json.loads((ROOT / 'benchmarks/results/camvid13_fit_cpu.json').read_text())['scores']
    runs = {name: found for name, found in scores.items() if 'fit' in found[0]}
    figure = Figure(figsize=(8, 5.4), layout='constrained')
    grid = figure.subplots(2, len(runs), sharex=True, sharey='row')
    for (losses, error), (name, found) in zip(grid.T, runs.items(), strict=True):
        for seed, run in enumerate(found):
            rows, label = run['fit'], seed == 0
            for key, color, text in (
                ('train_gt_loss_eval', COLORS['train'], 'training images'),
                ('val_gt_loss', COLORS['val'], 'validation images'),
            ):
                _draw(losses, rows, key, color, text if label else None)
            _draw(error, rows, 'error', COLORS['error'], 'x' if label else None)
            _draw(error, rows, 'weight', COLORS['weight'], 'F(x)' if label else None)
        losses.set(title=name, ylim=(0, None))
        error.set(xlabel='iteration')
        error.axhline(0, color='#dddddd', lw=1, zorder=0)
        for axes in (losses, error):
            axes.legend(fontsize=8, frameon=False)
            axes.spines[['top', 'right']].set_visible(False)
    grid[0, 0].set(ylabel='cross-entropy per pixel, eval mode')
    return figure


def _draw(axes, rows: list[dict], key: str, color: str, label: str | None) -> None:
    axes.plot([r['iter'] for r in rows], [r[key] for r in rows], color=color, label=label, lw=1.3)


if __name__ == '__main__':
    for draw in (fit_functions, fit_camvid13):
        path = ROOT / 'docs/images' / f'{draw.__name__}.svg'
        draw().savefig(path, format='svg', metadata={'Date': None})
        print(path.relative_to(ROOT))
