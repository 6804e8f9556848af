"""Looks at the labels that a data set's pipeline gives, before the training needs them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
from mmengine.dataset import RepeatDataset
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement

from mmdistill_ext.dataset_configs import untouched
from mmdistill_ext.isolation import isolated_rng

SECONDS = 5.0
"""After this time no further sample is looked at."""


def scan_labels(
    dataset: Any, limit: int, num_classes: int, ignore_index: int, key: str = 'train_dataloader'
) -> None:
    """Run the pipeline on up to ``limit`` samples and check the labels that it gives.

    Samples are spread evenly over the data set, of whatever wrappers. Neither the training's random
    numbers nor transforms with a memory notice.

    Raises:
        ValueError: A file is missing or a label has another value; the message names the file and
            ``key``.
    """
    while isinstance(dataset, RepeatDataset):  # the same samples again
        dataset = dataset.dataset
    samples, start, seen = untouched(dataset), perf_counter(), 0
    with isolated_rng(seed=0):
        for index in islice(spread(len(dataset)), limit):
            if seen and perf_counter() - start > SECONDS:
                break
            check_sample(samples, index, num_classes, ignore_index, key)
            seen += 1
    print_log(f'`{key}`: looked at the labels of {seen} of {len(dataset)} samples.', 'current')


def check_sample(dataset: Any, index: int, num_classes: int, ignore_index: int, key: str) -> None:
    """Check the labels of one sample (see :func:`scan_labels`)."""
    try:
        sample = dataset[index]['data_samples']
    except FileNotFoundError as error:
        raise ValueError(
            f'`{key}.dataset` should have a label for every image, and the image. Found none at '
            f"'{error.filename or error}'."
        ) from error
    values = label_values(sample)
    wrong = values[((values < 0) | (values >= num_classes)) & (values != ignore_index)]
    if wrong.size:
        raise ValueError(
            f'Labels should be in [0, {num_classes}) or {ignore_index} (ignored). Found '
            f"{wrong.tolist()} in '{_source(sample, index)}': check `{key}.dataset` (metainfo, "
            'reduce_zero_label, label_map) and `num_classes`.'
        )


def label_values(sample: Any) -> np.ndarray:
    """The values of a data sample's labels, each once: of its objects, or of its pixels.

    Returns:
        An empty array for samples without labels, or with those of another kind.
    """
    if not isinstance(sample, BaseDataElement):
        return np.array([], int)
    if 'gt_instances' in sample:
        labels = sample.gt_instances.get('labels')
    else:
        labels = sample.gt_sem_seg.data if 'gt_sem_seg' in sample else None
    return np.array([], int) if labels is None else np.unique(np.asarray(labels))


def spread(length: int) -> Iterator[int]:
    """All indices below ``length``, in an order whose every beginning is evenly spread."""
    bits = max(1, (length - 1).bit_length())
    halved = (int(f'{count:0{bits}b}'[::-1], 2) for count in range(1 << bits))
    return (index for index in halved if index < length)


def _source(sample: BaseDataElement, index: int) -> str:
    """The file that a sample's labels are from."""
    for key in ('seg_map_path', 'img_path'):
        if sample.metainfo.get(key):
            return sample.metainfo[key]
    return f'sample {index}'
