import copy
import random
from itertools import chain
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from torch.utils.data import Dataset

from mmdistill_ext.round_loader import (
    RoundSampler,
    build_labelled_loader,
    build_round_loader,
    held_out_loader_cfg,
)
from tests import tiny_seg


class Numbers(Dataset):
    """Draws random numbers when it is built, as some data sets do."""

    def __init__(self, length):
        self.noise = random.random(), np.random.rand(), torch.rand(1).item()
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


def as_rank(rank, world_size):
    names = dict(get_rank=lambda: rank, get_world_size=lambda: world_size)
    return mock.patch.multiple('mmdistill_ext.round_loader', **names)


def rounds(length, size, count, position=0, seed=3):
    """What the next rounds give, the position moved on in between."""
    sampler = RoundSampler(range(length), size, seed)
    sampler.position = position
    found = []
    for _ in range(count):
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
        sampler.position += sampler.size
    return found


@settings(max_examples=40)
@given(length=st.integers(1, 12), size=st.integers(1, 30), count=st.integers(1, 5))
def test_every_pass_gives_every_sample_once(length, size, count):
    places = list(chain(*rounds(length, size, count)))
    assert len(places) == size * count
    for start in range(0, len(places), length):
        turn = places[start : start + length]
        assert len(set(turn)) == len(turn)
        assert set(turn) <= set(range(length))


@settings(max_examples=40)
@given(
    length=st.integers(1, 12),
    size=st.integers(1, 8),
    world_size=st.integers(2, 4),
    count=st.integers(1, 3),
)
def test_ranks_share_what_one_rank_gives(length, size, world_size, count):
    size *= world_size
    whole = rounds(length, size, count)
    parts = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            parts.append(rounds(length, size, count))
    for expected, *shares in zip(whole, *parts, strict=True):
        assert {len(share) for share in shares} == {size // world_size}
        together = [None] * size
        for rank, share in enumerate(shares):
            together[rank::world_size] = share
        assert together == expected


@settings(max_examples=40)
@given(length=st.integers(1, 12), size=st.integers(1, 9), done=st.integers(0, 6))
def test_the_position_is_all_that_it_takes_to_go_on(length, size, done):
    whole = rounds(length, size, done + 2)
    assert rounds(length, size, 2, position=done * size) == whole[done:]


def test_a_round_is_the_same_until_the_position_moves():
    sampler = RoundSampler(range(20), 5, 3)
    assert list(sampler) == list(sampler)


def test_passes_and_seeds_have_permutations_of_their_own():
    first, second = rounds(20, 20, 2)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20)) != first
    assert rounds(20, 20, 1, seed=4) != [first]
    assert rounds(20, 20, 1, seed=None) == rounds(20, 20, 1, seed=0)


def test_sampling_leaves_the_generators_alone():
    before = torch.get_rng_state()
    rounds(7, 5, 4)
    assert torch.equal(torch.get_rng_state(), before)


def loader_cfg(**change):
    return dict(batch_size=2, num_workers=0, dataset=dict(type=Numbers, length=7)) | change


def test_a_loader_gives_so_many_whole_batches_per_round():
    cfg = loader_cfg(
        sampler=dict(type='InfiniteSampler', shuffle=True),
        batch_sampler=dict(type='Unknown'),
        drop_last=True,
    )
    before = copy.deepcopy(cfg)
    loader = build_round_loader(cfg, 3, seed=3, key='val_dataloader')
    assert cfg == before
    assert len(loader) == 3
    batches = [batch for _ in range(2) for batch in take_round(loader)]
    assert [len(batch) for batch in batches] == [2] * 6
    assert list(chain(*batches)) == list(chain(*rounds(7, 6, 2)))
    assert loader.sampler.position == 12


def take_round(loader):
    batches = list(loader)
    loader.sampler.position += loader.sampler.size
    return batches


def test_batches_are_counted_per_rank():
    with as_rank(1, 2):
        loader = build_round_loader(loader_cfg(), 3, seed=3, key='val_dataloader')
        assert loader.sampler.size == 12
        assert list(chain(*take_round(loader))) == rounds(7, 12, 1)[0]
    assert loader.sampler.position == 12


def test_a_loader_without_a_batch_size_gives_single_samples():
    cfg = loader_cfg()
    cfg.pop('batch_size')
    loader = build_round_loader(cfg, 3, seed=0, key='val_dataloader')
    assert [len(batch) for batch in loader] == [1, 1, 1]


def test_building_a_loader_draws_nothing():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    found = []
    for build in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if build:
            build_round_loader(loader_cfg(), 3, seed=3, key='val_dataloader')
        found.append(draw())
    assert found[0] == found[1]


@pytest.mark.parametrize('cfg', [None, {}, dict(batch_size=2), 'val.py', []])
def test_a_loader_needs_data(cfg):
    with pytest.raises(ValueError, match='`val_dataloader` should be the config of a loader'):
        build_round_loader(cfg, 3, seed=0, key='val_dataloader')


def empty_folder(root):
    (root / 'img/val').mkdir(parents=True)
    (root / 'ann/val').mkdir(parents=True)
    return {**tiny_seg.dataloader(root, 'val')['dataset'], '_scope_': 'mmseg'}


@pytest.mark.parametrize('dataset', [lambda root: Numbers(0), empty_folder], ids=['own', 'mmseg'])
def test_an_empty_data_set_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match=r'`FitHook.dataloader.dataset` should.*Found none'):
        build_round_loader(dict(dataset=dataset(tmp_path)), 3, 0, key='FitHook.dataloader')


def labelled(cfg, wanted):
    return build_labelled_loader(
        cfg,
        3,
        seed=0,
        key='val_dataloader',
        has_labels=lambda sample: sample >= wanted,
        measured='errors',
        label_kinds='boxes',
    )


def test_a_labelled_loader_looks_at_the_first_sample():
    assert [len(batch) for batch in labelled(loader_cfg(), 0)] == [2, 2, 2]
    message = (
        '`val_dataloader.dataset` should give labels to measure errors on: its pipeline should '
        r'load annotations \(boxes\). Found a sample without.'
    )
    with pytest.raises(ValueError, match=message):
        labelled(loader_cfg(), 1)
    with pytest.raises(ValueError, match='`val_dataloader` should be the config of a loader'):
        labelled(None, 0)


PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize'), dict(type='LoadAnnotations')]


def run_of(val):
    train = dict(batch_size=6, dataset=dict(type='A'))
    return SimpleNamespace(cfg=Config(dict(train_dataloader=train, val_dataloader=val)))


@pytest.mark.parametrize('is_detection', [False, True])
@pytest.mark.parametrize('labels_as_image', [False, True])
@pytest.mark.parametrize('own', [False, True])
def test_held_out_data_are_those_of_the_validation_or_the_hooks(own, is_detection, labels_as_image):
    loaders = {
        name: dict(batch_size=size, dataset=dict(type=name, pipeline=PIPELINE))
        for name, size in (('val', 1), ('hook', 2))
    }
    before = copy.deepcopy(loaders)
    cfg, key = held_out_loader_cfg(
        run_of(loaders['val']),
        loaders['hook'] if own else None,
        'SomeHook',
        is_detection=is_detection,
        labels_as_image=labels_as_image,
    )
    assert loaders == before
    assert key == ('SomeHook.dataloader' if own else 'val_dataloader')
    assert cfg['dataset']['type'] == ('hook' if own else 'val')
    assert cfg['batch_size'] == (2 if own else 6 if is_detection else 1)
    steps = [step['type'] for step in cfg['dataset']['pipeline']]
    assert (steps.index('LoadAnnotations') < steps.index('Resize')) == labels_as_image


@pytest.mark.parametrize('cfg', [None, {}, dict(batch_size=2), 'val.py'])
def test_what_is_no_loader_is_handed_on_with_its_key(cfg):
    for own in (False, True):
        found, key = held_out_loader_cfg(
            run_of(None if own else cfg),
            'x' if own else None,
            'SomeHook',
            is_detection=True,
            labels_as_image=True,
        )
        assert found == ('x' if own else cfg)
        assert key == ('SomeHook.dataloader' if own else 'val_dataloader')
