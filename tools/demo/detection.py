"""The page's part on detection."""

from pathlib import Path

from detection_pictures import MIN_SCORE, mask_table, scene_table
from figures import COLORS, bars, figure
from fit_section import fit_numbers, fit_state
from results import Demo, Measure, Model, curve, make_model, read_metrics, read_scalars
from tables import learning_curves, swatches, teacher_curves

from mmdistill_ext.visualization.contrast import CONTRAST_COLORS

MEASURE = Measure(mean='mAP', single='AP', key='coco/bbox_mAP', scale=100.0)
FRAMEWORKS = ('mmdetection', 'mmdet')
TITLE = 'distilled detectors on digit scenes'


def read_model(out: Path, name: str, classes: list[str]) -> Model:
    """Read the latest training and test of a model in the demo's folder."""
    metrics = read_metrics(out, name)
    scores = {digit: MEASURE.scale * metrics[f'coco/{digit}_precision'] for digit in classes}
    return make_model(read_scalars(out, name), scores, metrics, MEASURE)


def sections(demo: Demo) -> dict[str, str]:
    """What ``detection.html`` shows of this task alone."""
    masks = [
        ('teacher better', CONTRAST_COLORS['teacher']),
        ('student better or equal', CONTRAST_COLORS['student']),
        ('not trained on', CONTRAST_COLORS['void']),
    ]
    text = (
        'Task loss of the classes (the distillation term is not in it; with FIT, hard locations '
        'weigh F(x))'
    )
    fit = demo.models['student_fit']
    return dict(
        curves=learning_curves(demo, 'loss_cls', 'quality focal loss', text),
        shares=teacher_shares(demo),
        fit=fit_state(fit, 'locations', 'loss of the head per image'),
        fit_numbers=fit_numbers(fit, 'locations'),
        palette=swatches(list(zip(demo.meta['classes'], demo.meta['palette'], strict=True))),
        scenes=scene_table(demo),
        min_score=f'{100 * MIN_SCORE:.0f} %',
        legend=swatches(masks),
        masks=mask_table(demo),
    )


def teacher_shares(demo: Demo) -> str:
    """Return the pictures of where the teacher wins: over time, and at the end per class."""
    orange = '#{:02x}{:02x}{:02x}'.format(*CONTRAST_COLORS['teacher'])
    model, other, mixed = demo.models['student_sel'], demo.others[0], demo.mixed[0]
    lines = [
        (f'digit {other}', orange, other),
        ('background', COLORS['teacher'], 'background'),
        (f'digit {mixed}, mixed up by the teacher', COLORS['student_kd'], mixed),
    ]
    shares = [last_share(model, name) for name in ('background', *demo.digits)]
    ylabel = 'teacher better (% of locations)'
    return figure(
        teacher_curves(model, lines, ylabel), 'During training with SEL, on the training scenes'
    ) + figure(
        bars(['back-\nground', *demo.digits], shares, orange, ylabel),
        'The last iterations of the training, by label',
    )


def last_share(model: Model, name: str) -> float | None:
    """Share of a label's locations where the teacher was better when last counted, in per cent."""
    values = curve(model.scalars, f'teacher_better/sel/{name}', 100)[1]
    return values[-1] if values else None
