"""What the README shows is what runs."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdistill_ext.distillers.build import resolve_model_cfg
from mmdistill_ext.registry import MODELS

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_config_at_the_top_is_a_distillation(tmp_path):
    diff = re.search(r'```diff\n(.*?)```', README, re.DOTALL)[1]
    path = tmp_path / 'config.py'
    path.write_text(''.join(f'{line[1:]}\n' for line in diff.splitlines()))
    cfg = Config.fromfile(path)
    assert MODELS.get(cfg.model.type) is not None
    assert cfg.model.student.backbone.depth == 18
    assert resolve_model_cfg(cfg.model.teacher.model).backbone.depth == 101
    assert all(MODELS.get(loss.type) is not None for loss in cfg.model.losses.values())


@pytest.mark.parametrize('page', [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')])
def test_links_lead_to_files(page):
    links = re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_exist():
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    assert set(re.findall(r'(?:^|`)make ([a-z-]+)', README, re.MULTILINE)) <= targets
