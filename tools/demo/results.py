"""Reads what the demo's runs left behind."""

import json
import math
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np

VOID = 255
LIBRARIES = (
    'mmdistill-ext',
    'torch',
    'mmengine',
    'mmcv',
    'mmsegmentation',
    'numpy',
    'scikit-learn',
)


@dataclass(frozen=True)
class Model:
    """What the page says of one model.

    Args:
        scalars: What its training logged, line by line.
        iou: Class -> IoU in per cent, from the tested predictions; NaN for a class that is nowhere.
        miou: Mean IoU in per cent, as ``tools/test.py`` found it.
        last_miou: The same, as the last validation during training found it.
        step_ms: Median time of an iteration.
    """

    scalars: list[dict]
    iou: dict[str, float]
    miou: float
    last_miou: float
    step_ms: float


def read_model(out: Path, name: str, classes: list[str]) -> Model:
    """Read the latest training and test of a model in the demo's folder."""
    lines = max((out / 'runs' / name).glob('*/vis_data/scalars.json')).read_text().splitlines()
    scalars = [json.loads(line) for line in lines]
    metrics = json.loads(max((out / 'tests' / name).glob('*/*.json')).read_text())
    iou = class_iou(out / 'predictions' / name, out / 'data/annotations/val', len(classes))
    training_times = [line['time'] for line in scalars if 'loss' in line]
    return Model(
        scalars=scalars,
        iou=dict(zip(classes, iou.tolist(), strict=True)),
        miou=metrics['mIoU'],
        last_miou=curve(scalars, 'mIoU')[1][-1],
        step_ms=1000 * statistics.median(training_times),
    )


def curve(scalars: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return iterations and values of one scalar, from the lines that have it."""
    found = [(line['step'], line[name]) for line in scalars if name in line]
    return [step for step, _ in found], [value for _, value in found]


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


def mean_iou(iou: dict[str, float], names: list[str]) -> float:
    """Mean over some classes; those that are nowhere do not count."""
    values = [iou[name] for name in names if not math.isnan(iou[name])]
    return statistics.fmean(values) if values else math.nan


def busy_seconds(records: Iterable[dict]) -> float:
    """Return the time in which at least one of the steps ran, in seconds."""
    total = end = 0.0
    for record in sorted(records, key=lambda record: record['started']):
        stop = record['started'] + record['seconds']
        total += max(0.0, stop - max(end, record['started']))
        end = max(end, stop)
    return total


def versions() -> dict[str, str]:
    """Return name -> version of what is at work, whichever family brings it."""
    found = {dist.metadata['Name']: dist.version for dist in metadata.distributions()}
    names = [name for stem in LIBRARIES for name in (f'onedl-{stem}', stem) if name in found]
    return {'Python': platform.python_version(), **{name: found[name] for name in names}}
