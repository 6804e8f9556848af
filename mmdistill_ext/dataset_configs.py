"""Data sets inside wrappers such as RepeatDataset and ConcatDataset: as configs, and as built."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.config import ConfigDict
from mmengine.registry import TRANSFORMS


def wrapped_datasets(dataset: Any) -> list:
    """What a wrapper wraps, in order; nothing for a plain data set.

    Args:
        dataset: A config, whose parts are configs, or a data set, whose parts are data sets.
    """
    read = dataset.get if isinstance(dataset, Mapping) else lambda key: getattr(dataset, key, None)
    parts = [read('dataset'), *(read('datasets') or ())]
    return [part for part in parts if part is not None]


def walk_datasets(dataset: Any) -> Iterator:
    """A data set and all that it wraps, configs or built, each wrapper before its parts."""
    yield dataset
    for part in wrapped_datasets(dataset):
        yield from walk_datasets(part)


def plain_datasets(dataset: Any) -> Iterator:
    """The plain data sets inside any wrappers, configs or built."""
    return (part for part in walk_datasets(dataset) if not wrapped_datasets(part))


def follow_pipeline(dataset: Any, index: int) -> Iterator[dict]:
    """What a plain data set's pipeline makes of one sample: a copy after each transform.

    The pipeline is a copy too, so that transforms with a memory keep nothing of it.

    Args:
        dataset: A data set of mmengine's kind.
        index: Place of the sample.
    """
    results = dataset.get_data_info(index)
    for transform in copied_pipeline(dataset).transforms:
        results = transform(results)
        if results is None:
            return
        yield copy.deepcopy(results)


def untouched(dataset: Any) -> Any:
    """A copy of a data set, inside any wrappers, whose samples leave no trace in its transforms.

    What is large, the list of samples, is shared.
    """
    copied = copy.copy(dataset)
    if getattr(dataset, 'pipeline', None) is not None:
        copied.pipeline = copied_pipeline(dataset)
    if getattr(dataset, 'dataset', None) is not None:
        copied.dataset = untouched(dataset.dataset)
    if getattr(dataset, 'datasets', None) is not None:
        copied.datasets = [untouched(part) for part in dataset.datasets]
    return copied


def copied_pipeline(dataset: Any) -> Any:
    """A copy of a data set's pipeline; transforms that cannot be copied are shared."""
    pipeline = copy.copy(dataset.pipeline)
    parts = getattr(pipeline, 'transforms', pipeline)
    copied = [_copied(transform) for transform in parts]
    if parts is pipeline:
        return copied
    pipeline.transforms = copied
    return pipeline


def _copied(transform: Any) -> Any:
    try:
        return copy.deepcopy(transform)
    except Exception:  # an open file, say
        return transform


def innermost_config(dataset: dict) -> dict:
    """The config of the data set inside wrappers of one data set each; a reference, no copy."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def find_pipeline(dataset: dict) -> list:
    """The pipeline of the first data set inside any wrappers, or of a wrapper that has one.

    Args:
        dataset: Its config.

    Raises:
        ValueError: There is none.
    """
    inner = dataset
    while 'pipeline' not in inner and wrapped_datasets(inner):
        inner = wrapped_datasets(inner)[0]
    if 'pipeline' not in inner:
        raise ValueError(f'A data set should have a `pipeline`. Found none in {inner!r}.')
    return inner['pipeline']


def with_pipeline(dataset: dict, pipeline: list) -> dict:
    """Copy a data set's config with another pipeline, without what repeats or mixes its samples.

    Args:
        dataset: The config; of its wrappers only those that join several data sets stay.
        pipeline: For every plain data set.
    """
    if 'dataset' in dataset:
        return with_pipeline(dataset['dataset'], pipeline)
    copied = _with_parts(dataset, lambda part: with_pipeline(part, pipeline))
    if 'datasets' not in copied:
        copied.pipeline = pipeline
    return copied


def labels_first(dataset: dict) -> dict:
    """Copy a data set's config so that its pipelines load labels right after the image.

    The validation pipelines of mmdet load labels after they resized the image, for a metric that
    compares at the original size. A loss needs the labels at the size of the resized image.

    Args:
        dataset: The config.
    """
    copied = _with_parts(dataset, labels_first)
    if 'pipeline' in copied:
        pipeline = list(copied.pipeline)
        labels = [step for step in pipeline if _loads(step, 'Annotations', 'LoadAnnotations')]
        others = [step for step in pipeline if step not in labels]
        images = [i for i, step in enumerate(others) if _loads(step, 'Image', 'LoadImageFromFile')]
        place = images[0] + 1 if images else 0
        copied.pipeline = [*others[:place], *labels, *others[place:]]
    return copied


def _with_parts(dataset: dict, change: Callable[[dict], dict]) -> ConfigDict:
    """Copy a config and change what it wraps."""
    copied = ConfigDict(dataset).copy()
    if 'dataset' in copied:
        copied.dataset = change(copied.dataset)
    if 'datasets' in copied:
        copied.datasets = [change(part) for part in copied.datasets]
    return copied


def _loads(step: dict, what: str, loader: str) -> bool:
    """Whether a transform says by its name that it loads something, or is a loader of mmcv's kind.

    Args:
        step: Its config.
        what: A part of the name.
        loader: Name of mmcv's loader, whose heirs have any name.
    """
    import mmcv.transforms

    kind = step['type']
    if isinstance(kind, str):
        name = kind.rsplit('.', 1)[-1]
        with TRANSFORMS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    else:
        name = kind.__name__
    return what in name or (
        isinstance(kind, type) and issubclass(kind, getattr(mmcv.transforms, loader))
    )
