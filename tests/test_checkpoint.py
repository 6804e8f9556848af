import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from torch import nn

from mmdistill_ext.checkpoint import load_exactly, load_weights, write_atomic
from tests.evil import Evil


@pytest.fixture
def linear(tmp_path):
    model = nn.Linear(2, 3)
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=3)), path)
    return model, str(path)


def test_weights_and_meta_are_read(linear):
    model, path = linear
    loaded = load_weights(path)
    assert loaded['meta'] == dict(epoch=3)
    torch.testing.assert_close(dict(loaded['state_dict']), dict(model.state_dict()))


def test_bare_state_dict_of_a_wrapped_model_is_read(tmp_path):
    model = nn.Linear(2, 3)
    path = tmp_path / 'bare.pth'
    torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, path)
    assert set(load_weights(str(path))['state_dict']) == {'weight', 'bias'}


def test_training_checkpoint_of_mmengine_is_read_without_running_code(tmp_path):
    hub = MessageHub('test_checkpoint')
    hub.update_scalar('train/loss', np.float32(0.5))
    hub.update_scalar('train/loss', torch.tensor(0.25))
    path = tmp_path / 'iter_1.pth'
    torch.save(dict(state_dict=nn.Linear(1, 1).state_dict(), message_hub=hub.state_dict()), path)
    assert set(load_weights(str(path))['state_dict']) == {'weight', 'bias'}


def test_missing_file_names_key_and_path():
    with pytest.raises(FileNotFoundError, match="`teacher.checkpoint`.*Found 'nowhere.pth'"):
        load_weights('nowhere.pth', 'teacher.checkpoint')


@pytest.mark.parametrize('share', [0.0, 0.3, 0.95])
def test_truncated_file_is_refused(linear, tmp_path, share):
    content = Path(linear[1]).read_bytes()
    path = tmp_path / 'cut.pth'
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match='`checkpoint`') as caught:
        load_weights(str(path))
    assert 'cut.pth' in str(caught.value)


@pytest.mark.parametrize('zipped', [True, False])
def test_file_that_needs_code_is_refused_and_says_what_it_found(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    content = dict(state_dict=nn.Linear(1, 1).state_dict(), extra=Evil('should-never-exist'))
    torch.save(content, 'evil.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match='weights only.*refused.*mkdir'):
        load_weights('evil.pth')
    assert not (tmp_path / 'should-never-exist').exists()


@pytest.mark.parametrize('content', [dict(), dict(state_dict=dict()), dict(epoch=1), [1, 2]])
def test_file_without_weights_is_refused(tmp_path, content):
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    with pytest.raises(ValueError, match='state dict of tensors'):
        load_weights(str(path))


def test_equal_keys_pass_and_batch_counters_may_be_missing():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {k: v for k, v in model.state_dict().items() if 'num_batches' not in k}
    load_exactly(model, state, 'file')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda state: state.pop('bias'), '1 missing keys .e.g. bias'),
        (lambda state: state.update(extra=torch.zeros(1)), '1 unexpected keys .e.g. extra'),
        (
            lambda state: state.update(bias=torch.zeros(4)),
            r'bias: \(4,\) in the file, \(3,\) in the',
        ),
    ],
)
def test_other_model_is_refused(change, message):
    model = nn.Linear(2, 3)
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_exactly(model, state, 'file')


def test_keys_may_be_those_of_an_older_release():
    """A model that renames them itself, as FCOS's head does with those before mmdet 2.8."""

    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            if prefix + 'old' in state:
                state[prefix + 'bias'] = state.pop(prefix + 'old')
            super()._load_from_state_dict(state, prefix, *args)

    model = nn.Sequential(Renamed(2, 3))
    state = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    state['0.old'] = state.pop('0.bias')
    load_exactly(model, state, 'file')
    assert all((value == 1).all() for value in model.state_dict().values())
    assert '0.old' in state  # the caller's is left alone
    state['0.other'] = state.pop('0.old')
    with pytest.raises(ValueError, match=r'missing keys .e.g. 0.bias.*unexpected.*0.other'):
        load_exactly(model, state, 'file')


LEFTOVERS = {
    'the normalisation of early releases of mmengine': 'data_preprocessor.mean',
    'that of a network among others': 'students.a.data_preprocessor.std',
    'an average of mmdet 2': 'ema_backbone_stem_conv_weight',
    'an auxiliary head': 'auxiliary_head.conv_seg.weight',
    'one of several auxiliary heads': 'auxiliary_head.1.conv_seg.weight',
    'masks beside boxes': 'roi_head.mask_head.convs.0.conv.weight',
}


@pytest.mark.parametrize('name', LEFTOVERS.values(), ids=list(LEFTOVERS))
def test_what_published_checkpoints_have_besides_is_left_out_and_logged(name, capsys):
    MMLogger.get_instance(f'leftovers {name}')  # prints on what is captured here
    model = nn.Linear(2, 3)
    state = {**{k: torch.ones_like(v) for k, v in model.state_dict().items()}, name: torch.ones(1)}
    load_exactly(model, state, 'zoo.pth')
    assert all((value == 1).all() for value in model.state_dict().values())
    assert f'zoo.pth: 1 left out ({name}, ...)' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'config: 1 missing keys .e.g. bias.\.$'):
        load_exactly(model, {k: v for k, v in state.items() if k != 'bias'}, 'zoo.pth')


@pytest.mark.parametrize(
    'name', ['layer3.6.conv.weight', 'neck.0.weight', 'ema.weight', 'my_auxiliary_head.weight']
)
def test_parts_of_another_model_are_no_leftovers(name):
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=f'1 unexpected keys .e.g. {name}'):
        load_exactly(model, {**model.state_dict(), name: torch.ones(1)}, 'zoo.pth')


@pytest.mark.parametrize('prefix', ['module.', 'module.module.', '_orig_mod.', 'module._orig_mod.'])
def test_wrappers_are_taken_off_the_names(tmp_path, prefix):
    state = {f'{prefix}{k}': v for k, v in nn.Linear(2, 3).state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'wrapped.pth')
    assert set(load_weights(tmp_path / 'wrapped.pth')['state_dict']) == {'weight', 'bias'}


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / 'folder' / 'a.txt'
    write_atomic(path, lambda p: p.write_text('first'))
    assert path.read_text() == 'first'

    def fail(part):
        part.write_text('sec')
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        write_atomic(path, fail)
    assert path.read_text() == 'first'
    assert os.listdir(path.parent) == ['a.txt']
