"""What README.md and docs/ show is what runs."""

import ast
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.policies.fit_functions import ConstantFit
from mmdistill_ext.registry import FIT_FUNCTIONS, MODELS
from tests import tiny_seg
from tests.documents import PAGES, ROOT, blocks_of, check_types, is_program, program

README = (ROOT / 'README.md').read_text()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == 'python']
RUN = [block for block in PYTHON if block.not_run is None]
# What a block without `_base_` and `model` is a piece of, by its page.
BASES = {
    'collaborative.md': 'collaborative/col_fpn-fcn_r18-w16_1200_camvid-192x256.py',
    'detection.md': 'fit/fit-sel_gfl_r18_gfl_r18-w16_8e_bccd-320x240.py',
    'fit.md': 'fit/fit-kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
    'guide.md': 'kd/kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
    'selective.md': 'selective/sel_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
}
PLAIN = "_base_ = 'mmdistill_ext::plain/fpn_r18-w16_1200_camvid-192x256.py'\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader's config may lie: with the files that the documents name beside it."""
    for name in ('_base_', 'plain'):
        (tmp_path / name).symlink_to(ROOT / 'configs' / name)
    home = tmp_path / 'mine'
    home.mkdir()
    for name in ('my_student.py', 'my_teacher.py'):
        (home / name).write_text(PLAIN)
    weights = build_model(resolve_model_cfg(str(home / 'my_teacher.py'))).state_dict()
    torch.save(dict(state_dict=weights), home / 'my_teacher.pth')
    torch.save(dict(state_dict=tiny_backbone()), home / 'backbone.pth')
    tiny_seg.save_weights(home / 'teacher.pth', tiny_seg.model(16), seed=1)
    monkeypatch.chdir(home)
    return home


def tiny_backbone():
    cfg = dict(type='mmseg.ResNet', depth=18, base_channels=16, stem_channels=16)
    return {f'backbone.{key}': value for key, value in build_model(cfg).state_dict().items()}


def names_set_by(block):
    nodes = ast.parse(block.text).body
    return {name.id for node in nodes if isinstance(node, ast.Assign) for name in node.targets}


def read(block, folder):
    """The block as a config; a piece is read on top of a config of the project."""
    names, text = names_set_by(block), block.text
    if not names & {'_base_', 'model'}:
        assert block.page.name in BASES, f'{block}: `BASES` should say what it is a piece of'
        text = f'_base_ = {"mmdistill_ext::" + BASES[block.page.name]!r}\n{text}'
    (folder / 'config.py').write_text(text)
    return Config.fromfile(folder / 'config.py')


def fill(model):
    """Put tiny models where the document leaves them out."""
    if model.get('student') is ...:
        model.student = tiny_seg.model(8)
    if model.get('teacher') is ...:
        model.teacher = dict(model=..., checkpoint='teacher.pth')
    if 'teacher' in model and model.teacher.model is ...:
        model.teacher.model = tiny_seg.model(16)
    return model


@pytest.mark.parametrize('block', PYTHON, ids=str)
def test_python_can_be_parsed(block):
    ast.parse(block.text)


@pytest.mark.parametrize('block', [block for block in RUN if is_program(block)], ids=str)
def test_programs_run(block):
    with program(block):
        pass


def test_what_a_program_registers_is_gone_afterwards():
    """And what a framework registers meanwhile stays."""
    (block,) = (b for b in RUN if b.page.name == 'fit.md' and is_program(b))
    with program(block) as names:
        FIT_FUNCTIONS.register_module('Stays')(ConstantFit)
        assert FIT_FUNCTIONS.get('StepFit') is names['StepFit']
    assert FIT_FUNCTIONS.get('StepFit') is None
    assert FIT_FUNCTIONS.module_dict.pop('Stays') is ConstantFit


@pytest.mark.parametrize('block', [block for block in RUN if not is_program(block)], ids=str)
def test_configs_are_read_and_built(block, folder):
    """A block that cannot be stands behind a comment `not run: reason` in its page."""
    cfg = read(block, folder)
    scope = cfg.get('default_scope', 'mmseg')
    with DefaultScope.overwrite_default_scope(scope):
        for name in names_set_by(block) - {'_base_'}:
            check_types({name: cfg[name]})
        if 'model' in names_set_by(block):
            MODELS.build(fill(cfg.model))


def test_there_is_something_to_run():
    assert {block.page.name for block in RUN} >= set(BASES)


def test_the_config_at_the_top_is_a_distillation(tmp_path):
    (diff,) = (block for block in BLOCKS if block.language == 'diff')
    path = tmp_path / 'config.py'
    path.write_text(''.join(f'{line[1:]}\n' for line in diff.text.splitlines()))
    cfg = Config.fromfile(path)
    assert MODELS.get(cfg.model.type) is not None
    assert cfg.model.student.backbone.depth == 18
    assert resolve_model_cfg(cfg.model.teacher.model).backbone.depth == 101
    assert all(MODELS.get(loss.type) is not None for loss in cfg.model.losses.values())


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_exist():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    assert set(re.findall(r'(?:^|`)make ([a-z-]+)', README, re.MULTILINE)) <= targets
