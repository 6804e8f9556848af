"""Damaged files and strange content are refused by name, with what to do; never half loaded."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdistill_ext.checkpoint import load_weights
from mmdistill_ext.checkpoint_content import check_values, classes_of
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.export import load_student
from tests import tiny_seg


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


WEIGHTS = dict(weight=torch.ones(2))
CONTENTS = {
    'state is a list': (dict(state_dict=[1, 2]), 'holds a list'),
    'state is None': (dict(state_dict=None), 'holds a NoneType'),
    'no dict at all': ([1, 2], 'holds a list'),
    'empty': (dict(state_dict={}), 'holds an empty one'),
    'number as a name': (dict(state_dict={3: torch.ones(2)}), 'the name 3, which is no text'),
    'number as a weight': (dict(state_dict=dict(weight=1.0)), "'weight', a float"),
    'sparse': (dict(state_dict=dict(weight=torch.eye(2).to_sparse())), "'weight', a sparse tensor"),
    'csr': (dict(state_dict=dict(weight=torch.eye(2).to_sparse_csr())), "'weight', a sparse"),
    'quantised': (dict(state_dict=dict(weight=quantised())), "'weight', a quantised tensor"),
    'meta tensor': (
        dict(state_dict=dict(weight=torch.ones(2, device='meta'))),
        "'weight', a meta tensor: it has no values",
    ),
    'meta is a list': (dict(state_dict=WEIGHTS, meta=[1]), r'`meta` should be a dict. Found \[1\]'),
    'dataset_meta': (
        dict(state_dict=WEIGHTS, meta=dict(dataset_meta=7)),
        '`meta.dataset_meta` should be a dict. Found 7',
    ),
    'classes': (
        dict(state_dict=WEIGHTS, meta=dict(dataset_meta=dict(CLASSES=7))),
        '`meta.dataset_meta.CLASSES` should be names. Found 7',
    ),
    'name in dataset_meta': (
        dict(state_dict=WEIGHTS, meta=dict(dataset_meta={3: 'a'})),
        'dataset_meta 3` should be text',
    ),
    'iteration': (
        dict(state_dict=WEIGHTS, meta=dict(iter='7')),
        "`meta.iter` should be an integer. Found '7'",
    ),
}


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', CONTENTS)
def test_strange_content_is_named(tmp_path: Path, name: str):
    content, message = CONTENTS[name]
    path = tmp_path / 'strange.pth'
    torch.save(content, path)
    # quantised tensors need code to unpickle in some releases: refused all the same
    message = f'{message}|needs code' if name == 'quantised' else message
    with pytest.raises(ValueError, match=f"`teacher.checkpoint`.*'.*strange.pth'.*({message})"):
        load_weights(path, 'teacher.checkpoint')
    if (
        isinstance(content, dict)
        and content['state_dict'] is not WEIGHTS
        and name != 'number as a weight'
    ):
        with pytest.raises(ValueError, match=f"`checkpoint`.*'.*strange.pth'.*({message})"):
            CheckpointLoader.load_checkpoint(str(path))


def test_meta_data_may_be_missing(tmp_path: Path):
    for number, content in enumerate((dict(state_dict=WEIGHTS, meta=None), WEIGHTS)):
        torch.save(content, tmp_path / f'{number}.pth')
        assert load_weights(tmp_path / f'{number}.pth')['meta'] == {}


@pytest.mark.parametrize(
    ('meta', 'classes'),
    [
        (dict(), None),
        (dict(dataset_meta=None), None),
        (dict(dataset_meta=dict(classes=('a', 'b'))), ('a', 'b')),
        (dict(dataset_meta=dict(CLASSES=['a'])), ('a',)),
        (dict(dataset_meta=dict(classes='person')), ('person',)),
        (dict(CLASSES=['a', 'b']), ('a', 'b')),
    ],
)
def test_classes(meta: dict, classes: tuple | None):
    assert classes_of(meta) == classes


@pytest.mark.parametrize('zipped', [True, False])
def test_any_flipped_byte_of_the_pickle_is_named_or_harmless(tmp_path: Path, zipped: bool):
    """What is raised is what says which file it is; nothing else comes out of a damaged file."""
    path = tmp_path / 'flipped.pth'
    content = dict(state_dict=nn.Linear(1, 1).state_dict(), meta=dict(iter=3))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    refused = []
    for place in range(0, min(len(whole), 900), 7):
        for flip in (1, 255):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            try:
                load_weights(path, 'teacher.checkpoint')
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert all(re.search(r'`teacher\.checkpoint`.*flipped\.pth', text) for text in refused)


BAD = {
    'NaN': (float('nan'), 'NaN or infinite'),
    'infinity': (float('inf'), 'NaN or infinite'),
    'half infinity': (torch.tensor(float('inf')).half(), 'NaN or infinite'),
}


@pytest.mark.parametrize('name', BAD)
def test_weights_of_a_diverged_training_are_named(name: str):
    value, message = BAD[name]
    state = dict(a=torch.ones(2), b=torch.tensor([1.0, value]).to(getattr(value, 'dtype', None)))
    with pytest.raises(ValueError, match=f"^The file should .*{message} values in 'b'"):
        check_values(state, 'The file')


def test_negative_variances_are_named_and_counters_are_not():
    with pytest.raises(ValueError, match="variances >= 0. Found -1 in 'bn.running_var'"):
        check_values({'bn.running_var': torch.tensor([1.0, -1.0])}, 'The file')
    fine = dict(running_var=torch.zeros(1), mean=-torch.ones(1), n=torch.tensor(3))
    check_values({**fine, 'small': torch.ones(2).to(torch.float8_e4m3fn)}, 'The file')


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('decode_head.conv_seg.weight', float('nan')),
        ('backbone.layer1.0.conv1.weight', float('-inf')),
        ('backbone.bn1.running_var', -1.0),
    ],
)
def test_such_a_teacher_is_refused_and_such_a_student_is_not_shipped(tmp_path: Path, name, value):
    from mmengine.config import Config

    path = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(8), seed=1)
    content = torch.load(path)
    name = name if name in content['state_dict'] else 'backbone.stem.1.running_var'
    content['state_dict'][name].view(-1)[0] = value
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"`teacher.checkpoint`='.*t.pth' should have.*'{name}'"):
        Teacher(tiny_seg.model(8), path)
    plain = Config(dict(model=tiny_seg.model(8), default_scope='mmseg'))
    with pytest.raises(ValueError, match=f"`checkpoint` '.*t.pth' should have.*'{name}'"):
        load_student(plain, path)


def test_a_model_that_brings_its_weights_is_looked_at_too():
    def broken() -> nn.Module:
        model = nn.Conv2d(3, 1, 1)
        nn.init.constant_(model.weight, float('nan'))
        return model

    with pytest.raises(ValueError, match="`teacher.pretrained=True` should have finite.*'weight'"):
        Teacher(dict(type=broken), pretrained=True)
