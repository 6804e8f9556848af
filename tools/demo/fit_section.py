"""The page's section on FIT: what was measured during its training, and what it made of that."""

from figures import COLORS, curves, figure, signed_and_shares
from results import Model, curve


def fit_state(model: Model, units: str, loss: str) -> str:
    """Return the pictures of what FIT measured and made of it.

    Args:
        model: The student with FIT.
        units: What is simple or hard, in words.
        loss: What was measured, in words.
    """

    def series(label: str, color: str, key: str) -> tuple:
        return label, color, *curve(model.scalars, f'fit/{key}')

    losses = [
        series('training scenes', COLORS['student_fit'], 'train_gt_loss_eval'),
        series('training scenes, as trained on', COLORS['student'], 'train_gt_loss'),
        series('validation scenes', COLORS['student_kd'], 'val_gt_loss'),
    ]
    shares = [
        series(f'F(x), weight of hard {units}', COLORS['student_sel'], 'weight'),
        series(f'share of simple {units}', COLORS['student'], 'simple_share'),
    ]
    error = series('x = training - validation', COLORS['teacher'], 'error')
    return figure(curves(losses, loss), "The student's loss against the labels") + figure(
        signed_and_shares(error, shares), f'x, F(x), and the share of simple {units}'
    )


def fit_numbers(model: Model, units: str) -> str:
    """Say what FIT measured, whatever it was; ``units`` are simple or hard."""
    steps, errors = curve(model.scalars, 'fit/error')
    weights, shares, cost = (
        curve(model.scalars, f'fit/{key}')[1] for key in ('weight', 'simple_share', 'cost')
    )
    return (
        f'In this run x lay between {min(errors):.3f} and {max(errors):.3f}. At the end it was '
        f'{errors[-1]:.3f}, F(x) was {weights[-1]:.2f}, and {100 * shares[-1]:.1f} % of the '
        f'{units} were simple. The measurements begin with iteration {steps[0]}, when the running '
        'statistics of BatchNorm, with which the student is measured, have settled. Measuring took '
        f"{100 * cost[-1]:.1f} % of the training's time."
    )
