"""The page's pictures: curves and bars as SVG, label maps and masks as PNG, all as data URIs."""

import base64
import io
from collections.abc import Callable

import cv2
import matplotlib
import numpy as np

matplotlib.use('svg')
import matplotlib.pyplot as plt

COLORS = dict(
    teacher='#111827',
    student='#7c8798',
    student_kd='#c2548d',
    student_sel='#0a8f6c',
    student_fit='#3b6fd4',
)
STYLE = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#e8eaee',
    'axes.edgecolor': '#9aa3af',
    'axes.axisbelow': True,
    'legend.frameon': False,
    'svg.hashsalt': 'demo',
}


def _svg(*draw: Callable[[plt.Axes], None], size: tuple[float, float] = (5.2, 3.0)) -> str:
    """Return what each ``draw(axes)`` draws, one below the other, as a data URI."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(draw), figsize=size, layout='constrained', sharex=True, squeeze=False
        )
        for draw_one, row in zip(draw, axes[:, 0], strict=True):
            draw_one(row)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None})
        plt.close(figure)
    return 'data:image/svg+xml;base64,' + base64.b64encode(buffer.getvalue()).decode()


def curves(series: list[tuple], ylabel: str, level: tuple | None = None) -> str:
    """Draw values >= 0 over iterations.

    Args:
        series: (label, colour, iterations, values) of each curve.
        ylabel: What the values are.
        level: (label, colour, value) of a dashed horizontal line.

    Returns:
        A data URI.
    """

    def draw(axes: plt.Axes) -> None:
        _lines(axes, series)
        if level:
            label, color, value = level
            axes.axhline(value, color=color, label=label, lw=1.2, ls=(0, (4, 3)))
        axes.set(xlabel='iteration', ylabel=ylabel, ylim=(0, None))
        axes.legend(loc='best', fontsize=8)

    return _svg(draw)


def signed_and_shares(signed: tuple, shares: list[tuple]) -> str:
    """Draw a curve of either sign, and below it curves that start at 0, over the same iterations.

    Args:
        signed: (label, colour, iterations, values).
        shares: The same, of each curve below.

    Returns:
        A data URI.
    """

    def above(axes: plt.Axes) -> None:
        axes.axhline(0, color=STYLE['axes.edgecolor'], lw=1)
        _lines(axes, [signed])
        axes.legend(loc='best', fontsize=8)

    def below(axes: plt.Axes) -> None:
        _lines(axes, shares)
        axes.set(xlabel='iteration', ylim=(0, None))
        axes.legend(loc='best', fontsize=8)

    return _svg(above, below)


def _lines(axes: plt.Axes, series: list[tuple]) -> None:
    for label, color, steps, values in series:
        marker = 'o' if len(steps) < 12 else None
        axes.plot(steps, values, color=color, label=label, lw=1.8, marker=marker, ms=4)


def bars(names: list[str], values: list[float | None], color: str, ylabel: str) -> str:
    """Draw one bar per name, values in per cent; ``None`` leaves a gap. Return a data URI."""

    def draw(axes: plt.Axes) -> None:
        heights = [0 if value is None else value for value in values]
        axes.bar(names, heights, color=color, width=0.7)
        for index, value in enumerate(values):
            if value is not None:
                axes.text(index, value, f'{value:.0f}', ha='center', va='bottom', fontsize=8)
        axes.set(ylabel=ylabel, ylim=(0, 108))
        axes.grid(visible=False, axis='x')
        axes.tick_params(axis='x', length=0, labelsize=8)

    return _svg(draw)


def figure(picture: str, text: str) -> str:
    """Return a picture with its caption."""
    return f'<figure><img src="{picture}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def png(picture: np.ndarray) -> str:
    """Return an RGB picture ``(H, W, 3)`` uint8 as a data URI."""
    _, encoded = cv2.imencode('.png', np.ascontiguousarray(picture[..., ::-1]))
    return 'data:image/png;base64,' + base64.b64encode(encoded.tobytes()).decode()


def colored(values: np.ndarray, colors: dict[int, tuple]) -> np.ndarray:
    """Colour a map of values.

    Args:
        values: ``(H, W)`` uint8.
        colors: Value -> RGB, for every value in the map.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    palette = np.zeros((256, 3), np.uint8)
    for value, color in colors.items():
        palette[value] = color
    return palette[values]
