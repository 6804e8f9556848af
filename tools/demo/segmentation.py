"""The page's part on segmentation."""

import json
from pathlib import Path

import cv2
import numpy as np
from figures import COLORS, bars, colored, figure, png
from fit_section import fit_numbers, fit_state
from results import Demo, Measure, Model, make_model, read_metrics, read_scalars
from tables import NAMES, learning_curves, swatches, table, teacher_curves

from mmdistill_ext.visualization.contrast import CONTRAST_COLORS, CONTRAST_VALUES

MEASURE = Measure(mean='mIoU', single='IoU', key='mIoU')
FRAMEWORKS = ('mmsegmentation',)
TITLE = 'distillation on digit scenes'
VOID = 255
VOID_COLOR = (225, 225, 225)
SCENES_SHOWN = 6


def read_model(out: Path, name: str, classes: list[str]) -> Model:
    """Read the latest training and test of a model in the demo's folder."""
    iou = class_iou(out / 'predictions' / name, out / 'data/annotations/val', len(classes))
    scores = dict(zip(classes, iou.tolist(), strict=True))
    return make_model(read_scalars(out, name), scores, read_metrics(out, name), MEASURE)


def read_label(path: Path) -> np.ndarray:
    """Return a label map or mask, ``(H, W)`` uint8."""
    return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)


def class_iou(predictions: Path, labels: Path, num_classes: int) -> np.ndarray:
    """Intersection over union of each class, over all label maps of a folder.

    Args:
        predictions: Folder of predicted label maps, named as the labels.
        labels: Folder of label maps; 255 is void.
        num_classes: Number of classes ``C``.

    Returns:
        ``(C,)`` in per cent, NaN for a class that is nowhere.
    """
    pairs = np.zeros((num_classes, num_classes), np.int64)
    for path in sorted(labels.glob('*.png')):
        label, prediction = read_label(path), read_label(predictions / path.name)
        index = label.astype(int)[label != VOID] * num_classes + prediction[label != VOID]
        pairs += np.bincount(index, minlength=num_classes**2).reshape(pairs.shape)
    union = pairs.sum(0) + pairs.sum(1) - np.diag(pairs)
    return np.divide(100 * np.diag(pairs), union, out=np.full(len(union), np.nan), where=union > 0)


def sections(demo: Demo) -> dict[str, str]:
    """What ``segmentation.html`` shows of this task alone."""
    text = (
        'Task loss on the labels (the distillation term is not in it; with FIT, hard pixels weigh '
        'F(x))'
    )
    return dict(
        curves=learning_curves(demo, 'decode.loss_ce', 'cross-entropy', text),
        shares=teacher_shares(demo),
        fit=fit_state(demo.models['student_fit'], 'pixels', 'cross-entropy per pixel'),
        fit_numbers=fit_numbers(demo.models['student_fit'], 'pixels'),
        legend=legend(demo.meta),
        scenes=scene_table(demo),
    )


def teacher_shares(demo: Demo) -> str:
    """Return the pictures of where the teacher wins: over time, and at the end per class."""
    orange = '#{:02x}{:02x}{:02x}'.format(*CONTRAST_COLORS['teacher'])
    other, mixed = demo.others[0], demo.mixed[0]
    lines = [
        (f'digit {other}', orange, other),
        ('all pixels', COLORS['teacher'], ''),
        (f'digit {mixed}, mixed up by the teacher', COLORS['student_kd'], mixed),
    ]
    summary = json.loads((demo.out / 'contrast' / 'summary.json').read_text())
    shares = [summary['classes'][name]['teacher_better'] for name in demo.meta['classes']]
    values = [None if share is None else 100 * share for share in shares]
    overall = f'{100 * summary["overall"]["teacher_better"]:.0f} % of all pixels'
    ylabel = 'teacher better (% of pixels)'
    return figure(
        teacher_curves(demo.models['student_sel'], lines, ylabel),
        'During training with SEL, on the training scenes',
    ) + figure(
        bars(['back-\nground', *demo.digits], values, orange, ylabel),
        f'Finished student, on the validation scenes, by label ({overall})',
    )


def legend(meta: dict) -> str:
    """Return what the colours of label maps and of contrast masks mean."""
    masks = [
        ('teacher better', CONTRAST_COLORS['teacher']),
        ('student better or equal', CONTRAST_COLORS['student']),
        ('void', VOID_COLOR),
    ]
    labels = list(zip(meta['classes'], meta['palette'], strict=True))
    return f'<p>{swatches(labels + masks[-1:])}</p><p>Contrast mask: {swatches(masks)}</p>'


def scene_table(demo: Demo) -> str:
    """Return the first validation scenes: image, label, predictions, contrast mask."""
    out = demo.out
    classes = {**dict(enumerate(demo.meta['palette'])), VOID: VOID_COLOR}
    contrast = {value: CONTRAST_COLORS[name] for name, value in CONTRAST_VALUES.items()}
    contrast[CONTRAST_VALUES['void']] = VOID_COLOR
    shown = (*demo.students, 'teacher')
    maps = [(out / 'data/annotations/val', classes)]
    maps += [(out / 'predictions' / name, classes) for name in shown]
    maps += [(out / 'contrast' / 'masks', contrast)]
    rows = []
    for path in sorted((out / 'data/images/val').glob('*.png'))[:SCENES_SHOWN]:
        pictures = [cv2.imread(str(path))[..., ::-1]]
        pictures += [colored(read_label(folder / path.name), colors) for folder, colors in maps]
        rows.append([f'<img src="{png(picture)}" alt="">' for picture in pictures])
    header = ['Image', 'Label', *(NAMES[name] for name in shown), 'Contrast mask']
    return table(header, rows, 'scenes')
