"""Reads what the demo's runs left behind."""

import json
from importlib import metadata

import cv2
import numpy as np

VOID = 255
LIBRARIES = ('mmdistill-ext', 'torch', 'mmengine', 'mmcv', 'mmsegmentation', 'numpy', 'scikit-learn')


def read_scalars(run):
    """Return the logged scalars of the latest run in a work folder, one dict per line."""
    lines = max(run.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(scalars, name):
    """Return iterations and values of one scalar, from the lines that have it."""
    found = [(line['step'], line[name]) for line in scalars if name in line]
    return [step for step, _ in found], [value for _, value in found]


def read_metrics(test):
    """Return the metrics that ``tools/test.py`` left in a work folder."""
    return json.loads(max(test.glob('*/*.json')).read_text())


def read_label(path):
    """Return a label map or mask, ``(H, W)`` uint8."""
    return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)


def class_iou(predictions, labels, num_classes):
    """Intersection over union of each class, over all label maps of a folder.

    Args:
        predictions (Path): Folder of predicted label maps, named as the labels.
        labels (Path): Folder of label maps; 255 is void.
        num_classes (int): Number of classes ``C``.

    Returns:
        ndarray: ``(C,)`` in per cent, NaN for a class that is nowhere.
    """
    pairs = np.zeros((num_classes, num_classes), np.int64)
    for path in sorted(labels.glob('*.png')):
        label, prediction = read_label(path), read_label(predictions / path.name)
        index = label.astype(int)[label != VOID] * num_classes + prediction[label != VOID]
        pairs += np.bincount(index, minlength=num_classes**2).reshape(pairs.shape)
    union = pairs.sum(0) + pairs.sum(1) - np.diag(pairs)
    return np.divide(100 * np.diag(pairs), union, out=np.full(len(union), np.nan), where=union > 0)


def busy_seconds(records):
    """Return the time in which at least one of the steps ran, in seconds."""
    total, end = 0.0, 0.0
    for record in sorted(records, key=lambda record: record['started']):
        stop = record['started'] + record['seconds']
        total += max(0.0, stop - max(end, record['started']))
        end = max(end, stop)
    return total


def versions():
    """Return name -> version of the libraries at work, whichever family brings them."""
    found = {dist.metadata['Name']: dist.version for dist in metadata.distributions()}
    names = [name for stem in LIBRARIES for name in (stem, f'onedl-{stem}') if name in found]
    return {name: found[name] for name in names}
