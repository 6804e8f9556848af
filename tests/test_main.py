"""``python -m mmdistill_ext SCRIPT``, in this process."""

import sys
from pathlib import Path

import pytest

from mmdistill_ext import safe_loading
from mmdistill_ext.__main__ import main

SAY = 'import sys\nprint(__name__, __file__, sys.argv, sys.path[0])\n'


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setattr(safe_loading, '_TRUSTED', set())


def test_the_script_gets_its_own_arguments(tmp_path: Path, capsys: pytest.CaptureFixture):
    script = tmp_path / 'train.py'
    script.write_text(SAY)
    arguments = ['run.py', '--trust', 'x', '--cfg-options', 'a=1']
    main(['--trust', 'a.pth', '--trust', 'https://b.c/d.pth', str(script), *arguments])
    said = f'__main__ {script} {[str(script), *arguments]} {tmp_path}'
    assert capsys.readouterr().out.strip() == said
    assert {str(Path('a.pth').resolve()), 'https://b.c/d.pth'} == safe_loading._TRUSTED


def test_a_missing_script_is_named(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(['nowhere.py'])
    assert "Found 'nowhere.py'" in capsys.readouterr().err
