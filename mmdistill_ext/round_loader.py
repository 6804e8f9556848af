"""Loaders for measuring on a few batches at a time, round after round over a data set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmengine.config import ConfigDict
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset, Sampler

from mmdistill_ext.isolation import isolated_rng


class RoundSampler(Sampler):
    """Gives this rank's share of the next ``size`` samples, pass after pass over the data.

    Every pass is a permutation of its own, so that neighbours (frames of a video) do not come
    together. Where it stands is one number, ``position``, the same on all ranks.

    Args:
        dataset: With at least one sample.
        size: Samples of one round, of all ranks together.
        seed: Of the permutations.

    Attributes:
        position: Samples given in the rounds before this.
    """

    def __init__(self, dataset: Dataset, size: int, seed: int | None = None) -> None:
        self.length = len(dataset)
        self.size = size
        self.seed = seed or 0
        self.position = 0

    def __iter__(self) -> Iterator[int]:
        orders: dict[int, list[int]] = {}
        for place in range(self.position + get_rank(), self.position + self.size, get_world_size()):
            turn, offset = divmod(place, self.length)
            if turn not in orders:
                generator = torch.Generator().manual_seed(self.seed + turn)
                orders[turn] = torch.randperm(self.length, generator=generator).tolist()
            yield orders[turn][offset]

    def __len__(self) -> int:
        return self.size // get_world_size()


def build_round_loader(cfg: dict, batches: int, seed: int | None, key: str) -> DataLoader:
    """Build a loader that goes through ``batches`` batches per rank, from its sampler's position.

    Whoever used a round moves the position on, by the sampler's ``size``. Building the loader draws
    no random number from the training's generators.

    Args:
        cfg: A loader's config, such as ``val_dataloader``; its sampler is replaced.
        batches: Batches per round and rank, >= 1.
        seed: The run's.
        key: The config key to name in errors.

    Raises:
        ValueError: The config is none, or its data set is empty.
    """
    if not isinstance(cfg, dict) or 'dataset' not in cfg:
        raise ValueError(f'`{key}` should be the config of a loader with data. Found {cfg!r}.')
    cfg = ConfigDict(cfg).copy()
    cfg.pop('batch_sampler', None)
    cfg.pop('drop_last', None)
    size = batches * cfg.get('batch_size', 1) * get_world_size()
    cfg.sampler = dict(type=_sampler, size=size, key=key)
    try:
        with isolated_rng():
            return Runner.build_dataloader(cfg, seed=seed)
    except ValueError as error:
        if 'need at least one array' in str(error):  # what mmengine makes of an empty folder
            raise _empty(key) from error
        raise


def _sampler(dataset: Dataset, size: int, key: str, seed: int | None) -> RoundSampler:
    if len(dataset) == 0:
        raise _empty(key)
    return RoundSampler(dataset, size, seed)


def _empty(key: str) -> ValueError:
    return ValueError(f'`{key}.dataset` should have at least one sample. Found none.')


def with_pipeline(dataset: dict, pipeline: list) -> dict:
    """Copy a data set's config with another pipeline, without what repeats or mixes its samples."""
    dataset = ConfigDict(dataset).copy()
    if 'dataset' in dataset:
        return with_pipeline(dataset.dataset, pipeline)
    if 'datasets' in dataset:
        dataset.datasets = [with_pipeline(part, pipeline) for part in dataset.datasets]
    else:
        dataset.pipeline = pipeline
    return dataset


def find_pipeline(dataset: dict) -> list:
    """The pipeline of the (first) data set inside any wrappers."""
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    if 'pipeline' not in dataset:
        raise ValueError(f'A data set should have a `pipeline`. Found none in {dataset!r}.')
    return dataset['pipeline']


def labels_first(dataset: dict) -> dict:
    """Copy a data set's config so that its pipelines load labels right after the image.

    The validation pipelines of mmdet load them after they resized the image, for a metric that
    wants them at the original size; a loss needs what is done to the image done to them too.
    """
    dataset = ConfigDict(dataset).copy()
    if 'dataset' in dataset:
        dataset.dataset = labels_first(dataset.dataset)
    if 'datasets' in dataset:
        dataset.datasets = [labels_first(part) for part in dataset.datasets]
    if 'pipeline' in dataset:
        pipeline = list(dataset.pipeline)
        labels = [step for step in pipeline if _last_name(step).endswith('Annotations')]
        others = [step for step in pipeline if step not in labels]
        images = [i for i, step in enumerate(others) if 'Image' in _last_name(step)]
        place = images[0] + 1 if images else 0
        dataset.pipeline = [*others[:place], *labels, *others[place:]]
    return dataset


def _last_name(step: dict) -> str:
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).rsplit('.', 1)[-1]
