"""Loaders for measuring on a few batches at a time, round after round over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol

import torch
from mmengine.config import ConfigDict
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Sampler

from mmdistill_ext.dataset_configs import labels_first
from mmdistill_ext.isolation import isolated_rng


class RoundLoader(Protocol):
    """A PyTorch loader whose sampler is a :class:`RoundSampler`."""

    dataset: Any
    sampler: RoundSampler
    collate_fn: Callable[[list], dict]

    def __iter__(self) -> Iterator[dict]: ...


class RoundSampler(Sampler):
    """Gives this rank's share of the next ``size`` samples, pass after pass over the data (FIT-6).

    Every pass is a permutation of its own, so that neighbours (frames of a video) do not come
    together. The state of the sampler is one number, ``position``, the same on all ranks.

    Args:
        dataset: A data set with at least one sample.
        size: Samples of one round, of all ranks together.
        seed: Seed of the permutations.

    Attributes:
        position: Number of samples given in earlier rounds.
    """

    def __init__(self, dataset: Sized, size: int, seed: int | None = None) -> None:
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


def build_round_loader(cfg: dict | None, batches: int, seed: int | None, key: str) -> RoundLoader:
    """Build a loader that goes through ``batches`` batches per rank, from its sampler's position.

    The caller advances ``loader.sampler.position`` by ``loader.sampler.size`` after each round.
    Building the loader draws no random number from the training's generators.

    Args:
        cfg: A loader's config, such as ``val_dataloader``; its sampler is replaced.
        batches: Batches per round and rank, >= 1.
        seed: The run's seed.
        key: The config key to name in errors.

    Raises:
        ValueError: There is no config, or its data set is empty.
    """
    if not isinstance(cfg, dict) or 'dataset' not in cfg:
        raise ValueError(f'`{key}` should be the config of a loader with data. Found {cfg!r}.')
    rounds = ConfigDict(cfg).copy()
    rounds.pop('batch_sampler', None)
    rounds.pop('drop_last', None)
    size = batches * rounds.get('batch_size', 1) * get_world_size()
    rounds.sampler = dict(type=_sampler, size=size, key=key)
    try:
        with isolated_rng():
            return Runner.build_dataloader(rounds, seed=seed)
    except ValueError as error:
        if 'need at least one array' in str(error):  # what mmengine makes of an empty folder
            raise _empty(key) from error
        raise


def batch_size(loader: DataLoader) -> int:
    """Images in a batch of a loader, of one process; its batch sampler says so if it has one."""
    if loader.batch_size is not None:
        return loader.batch_size
    return getattr(loader.batch_sampler, 'batch_size', 1)


def _sampler(dataset: Sized, size: int, key: str, seed: int | None) -> RoundSampler:
    if len(dataset) == 0:
        raise _empty(key)
    return RoundSampler(dataset, size, seed)


def _empty(key: str) -> ValueError:
    return ValueError(f'`{key}.dataset` should have at least one sample. Found none.')


def held_out_loader_cfg(
    runner: Runner, dataloader: dict | None, hook: str, *, is_detection: bool, labels_as_image: bool
) -> tuple[dict | None, str]:
    """The config of the loader that a hook measures on, and the config key that it stands under.

    Args:
        runner: The runner, whose config has the loaders of validation and training.
        dataloader: The hook's own loader config; ``val_dataloader`` when not given, for detectors
            with the training's batch size, since a detector's loss is divided by the positives of
            its batch.
        hook: Name of the hook, for the key.
        is_detection: The model is a detector.
        labels_as_image: Labels are to have the size of the image as the model sees it.

    Returns:
        The config, unchecked, and the key for errors.
    """
    key = 'val_dataloader' if dataloader is None else f'{hook}.dataloader'
    cfg = runner.cfg.get(key) if dataloader is None else dataloader
    if not isinstance(cfg, dict) or 'dataset' not in cfg:
        return cfg, key
    if labels_as_image:
        cfg = {**cfg, 'dataset': labels_first(cfg['dataset'])}
    if is_detection and dataloader is None:
        cfg = {**cfg, 'batch_size': runner.cfg.train_dataloader.batch_size}
    return cfg, key


def build_labelled_loader(
    cfg: dict | None,
    batches: int,
    seed: int | None,
    key: str,
    *,
    has_labels: Callable[[dict], bool],
    measured: str,
    label_kinds: str = '',
) -> RoundLoader:
    """Build a loader of rounds (see :func:`build_round_loader`) over data with labels.

    Args:
        cfg: A loader's config.
        batches: Batches per round and rank, >= 1.
        seed: The run's seed.
        key: The config key to name in errors.
        has_labels: Says whether a sample of the data set has the labels that are needed.
        measured: What is measured on the labels, for errors.
        label_kinds: The labels that are needed, for errors.

    Raises:
        ValueError: There is no config, its data set is empty, or its first sample has no labels.
    """
    loader = build_round_loader(cfg, batches, seed, key)
    with isolated_rng():
        sample = loader.dataset[0]
    if not has_labels(sample):
        kinds = f' ({label_kinds})' if label_kinds else ''
        raise ValueError(
            f'`{key}.dataset` should give labels to measure {measured} on: its pipeline should '
            f'load annotations{kinds}. Found a sample without.'
        )
    return loader
