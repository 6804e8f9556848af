"""Nothing that is loaded runs code, wherever it is loaded."""

import argparse
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmdistill_ext import safe_loading
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.safe_loading import add_trust_argument, trust
from tests import tiny_seg
from tests.evil import Evil


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A checkpoint that makes the folder 'ran' beside it when its code runs."""
    state = build_model({'_scope_': 'mmseg', **tiny_seg.model(8)}).state_dict()
    state = {**state, **{k.removeprefix('backbone.'): v for k, v in state.items()}}
    content = dict(state_dict=state, meta={}, extra=Evil(tmp_path / 'ran'))
    torch.save(content, tmp_path / 'evil.pth')
    return tmp_path / 'evil.pth'


@pytest.fixture
def nobody_trusted():
    kept = set(safe_loading._TRUSTED)
    yield
    safe_loading._TRUSTED.clear()
    safe_loading._TRUSTED.update(kept)


def pretrained(path: Path) -> dict:
    cfg = tiny_seg.model(8)
    cfg['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint=str(path))
    return cfg


def by_part(path: Path) -> None:
    """Only those weights of the file that begin with a prefix."""
    cfg = pretrained(path)
    cfg['backbone']['init_cfg']['prefix'] = 'backbone.'
    build_model(cfg).init_weights()


def distilled(student: dict, root: Path) -> nn.Module:
    teacher = tiny_seg.save_weights(root / 'teacher.pth', tiny_seg.model(8), seed=1)
    return build_model(
        dict(
            type='mmdistill_ext.TeacherStudentDistiller',
            student=student,
            teacher=dict(model=tiny_seg.model(8), checkpoint=teacher),
            losses=dict(kd=dict(type='KDLoss')),
        )
    )


def collaborative(path: Path) -> nn.Module:
    students = dict(a=pretrained(path), b=tiny_seg.model(8))
    second = dict(type='MinLoss')
    kind = 'mmdistill_ext.CollaborativeDistiller'
    return build_model(dict(type=kind, students=students, second=second))


def torch_file(path: Path) -> None:
    """A scheme that somebody registered, with a loader that unpickles anything."""

    def load(filename: str, map_location: object) -> object:
        return torch.load(filename[8:], map_location, weights_only=False)

    CheckpointLoader.register_scheme('their://', load, force=True)
    CheckpointLoader.load_checkpoint(f'their://{path}')


INIT = 'backbone.init_cfg.checkpoint'
PLACES = {
    'init_cfg': (lambda path: build_model(pretrained(path)).init_weights(), f'model.{INIT}'),
    'init_cfg with a prefix': (by_part, f'model.{INIT}'),
    'pretrained': (
        lambda path: build_model({**tiny_seg.model(8), 'pretrained': str(path)}).init_weights(),
        'model.pretrained',
    ),
    'student': (
        lambda path: distilled(pretrained(path), path.parent).init_weights(),
        f'student.{INIT}',
    ),
    'student that learns with others': (
        lambda path: collaborative(path).init_weights(),
        f'students.a.{INIT}',
    ),
    'load_checkpoint': (lambda path: load_checkpoint(nn.Linear(1, 1), str(path)), 'checkpoint'),
    'CheckpointLoader': (lambda path: CheckpointLoader.load_checkpoint(path), 'checkpoint'),
    'scheme of somebody': (torch_file, 'checkpoint'),
}


@pytest.mark.parametrize('place', PLACES)
def test_code_is_refused_in_every_place(evil: Path, place: str):
    load, key = PLACES[place]
    unpickle = torch.load
    with pytest.raises(ValueError, match=rf'`{key}` .* weights only.*refused.*mkdir.*`--trust .*'):
        load(evil)
    assert not (evil.parent / 'ran').exists()
    assert torch.load is unpickle


@pytest.mark.parametrize('place', PLACES)
def test_trusted_files_are_unpickled_in_every_place(evil: Path, place: str, nobody_trusted: None):
    load, _ = PLACES[place]
    trust(evil.parent / '.' / 'evil.pth', f'their://{evil}')
    load(evil)
    assert (evil.parent / 'ran').exists()


def test_unknown_scheme_is_a_file_that_is_checked(evil: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(evil.parent)
    (evil.parent / 'x:').mkdir()
    evil.rename(evil.parent / 'x:' / 'file')
    with pytest.raises(ValueError, match="'x://file' needs code"):
        CheckpointLoader.load_checkpoint('x://file')
    assert not (evil.parent / 'ran').exists()


def test_missing_pretrained_weights_name_their_key():
    with pytest.raises(FileNotFoundError, match=rf"`model.{INIT}` .*'nowhere.pth'"):
        build_model(pretrained(Path('nowhere.pth'))).init_weights()


def test_what_mmengine_loads_is_what_it_was(tmp_path: Path):
    """Weights, meta data, bare tensors; on the device that was asked for."""
    for content in (dict(state_dict=nn.Linear(1, 1).state_dict(), meta=dict(a=1)), torch.ones(2)):
        torch.save(content, tmp_path / 'a.pth')
        loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), map_location='meta')
        first = loaded['state_dict']['weight'] if isinstance(loaded, dict) else loaded
        assert first.is_meta
        assert not isinstance(loaded, dict) or loaded['meta'] == dict(a=1)


@pytest.mark.parametrize(
    ('nargs', 'line'), [('+', 'run.py --trust a b'), (None, '--trust a run.py')]
)
def test_option_names_what_is_trusted(nargs: str | None, line: str):
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_trust_argument(parser, nargs)
    args = parser.parse_args(line.split())
    assert (args.config, args.trust) == ('run.py', ['a', 'b'][: 2 if nargs else 1])
    assert parser.parse_args(['run.py']).trust == []
