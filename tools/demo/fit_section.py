"""The page's section on FIT: what was measured during its training, and what it made of that."""

from figures import COLORS, curves, figure, signed_and_shares
from results import Model, curve


def fit_state(model: Model) -> str:
    """Return the pictures of what FIT measured and made of it."""

    def series(label: str, color: str, key: str) -> tuple:
        return label, color, *curve(model.scalars, f'fit/{key}')

    losses = [
        series('training scenes', COLORS['student_fit'], 'train_gt_loss_eval'),
        series('training scenes, as trained on', COLORS['student'], 'train_gt_loss'),
        series('validation scenes', COLORS['student_kd'], 'val_gt_loss'),
    ]
    shares = [
        series('F(x), weight of hard pixels', COLORS['student_sel'], 'weight'),
        series('share of simple pixels', COLORS['student'], 'simple_share'),
    ]
    error = series('x = training - validation', COLORS['teacher'], 'error')
    return figure(
        curves(losses, 'cross-entropy per pixel'), "The student's loss against the labels"
    ) + figure(signed_and_shares(error, shares), 'x, F(x), and the share of simple pixels')


def fit_numbers(model: Model) -> str:
    """Say what FIT measured, whatever it was."""
    steps, errors = curve(model.scalars, 'fit/error')
    weights, shares, cost = (
        curve(model.scalars, f'fit/{key}')[1] for key in ('weight', 'simple_share', 'cost')
    )
    return (
        f'In this run x lay between {min(errors):.3f} and {max(errors):.3f}. At the end it was '
        f'{errors[-1]:.3f}, F(x) was {weights[-1]:.2f}, and {100 * shares[-1]:.1f} % of the pixels '
        f'were simple. The measurements begin with iteration {steps[0]}, when the running '
        'statistics of BatchNorm, with which the student is measured, have settled. Measuring took '
        f"{100 * cost[-1]:.1f} % of the training's time."
    )
