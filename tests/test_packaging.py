"""What is inside the wheel, and that downstream configs find it."""

import os
import shutil
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from mmdistill_ext.version import __version__

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ('configs', 'tools')


def files_of(folder: Path) -> dict[str, bytes]:
    """Return name -> content of what a folder ships, names relative to its parent."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in files
        if '__pycache__' not in path.parts
    }


def build(source: Path, kind: str, out: Path) -> Path:
    """Call setuptools' own build hook, as pip does, without a network."""
    out.mkdir()
    code = f'from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})'
    subprocess.run([sys.executable, '-c', code], cwd=source, check=True, capture_output=True)
    return next(out.iterdir())


@pytest.fixture(scope='module', params=['checkout', 'sdist'])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Build the wheel of a copy of the checkout, straight or by way of the source archive."""
    tmp = tmp_path_factory.mktemp(request.param)
    source = tmp / 'source'
    ignored = shutil.ignore_patterns('.git', '.venv*', 'work_dirs', 'build', 'dist', '*.egg-info')
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    if request.param == 'sdist':
        shutil.unpack_archive(build(source, 'sdist', tmp / 'sdist'), tmp / 'unpacked')
        source = next((tmp / 'unpacked').iterdir())
    with ZipFile(build(source, 'wheel', tmp / 'wheel')) as archive:
        yield archive


@pytest.fixture
def core_metadata(wheel: ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.parametrize('folder', SHIPPED)
def test_wheel_holds_configs_and_tools_as_files(wheel: ZipFile, folder: str):
    prefix = 'mmdistill_ext/.mim/'
    shipped = {
        name.removeprefix(prefix): wheel.read(name)
        for name in wheel.namelist()
        if name.startswith(f'{prefix}{folder}/')
    }
    assert shipped == files_of(ROOT / folder)
    assert shipped


def test_wheel_holds_every_module_and_nothing_else(wheel: ZipFile):
    modules = {name for name in files_of(ROOT / 'mmdistill_ext') if '/.mim/' not in name}
    rest = {name for name in wheel.namelist() if '/.mim/' not in name and '.dist-info/' not in name}
    assert rest == modules  # no `.pth` file: Python starts as it does without the package
    assert 'mmdistill_ext/.mim/model-index.yml' in wheel.namelist()


def test_metadata(core_metadata: Message):
    assert core_metadata['Name'] == 'mmdistill-ext'
    assert core_metadata['Version'] == __version__
    assert core_metadata['Requires-Python'] == '>=3.10'
    assert core_metadata['License-Expression'] == 'Apache-2.0'
    assert core_metadata.get_all('License-File') == ['LICENSE', 'NOTICE']
    extras = {'onedl', 'onedl-seg', 'onedl-det', 'openmmlab', 'openmmlab-seg', 'openmmlab-det'}
    assert extras | {'demo', 'tensorboard', 'dev'} == set(core_metadata.get_all('Provides-Extra'))


def test_hard_requirements_bring_no_framework_and_no_torchvision(core_metadata: Message):
    requirements = core_metadata.get_all('Requires-Dist')
    assert [name for name in requirements if 'extra ==' not in name] == ['numpy', 'torch>=2.4']
    assert not [name for name in requirements if 'torchvision' in name]


@pytest.mark.parametrize('folder', SHIPPED)
def test_editable_install_finds_configs_and_tools(folder: str):
    assert (ROOT / 'mmdistill_ext' / '.mim' / folder).resolve() == ROOT / folder


def test_installed_wheel_runs_other_projects_scripts(wheel: ZipFile, tmp_path: Path):
    """A plain mmengine script, which does not import this package before it parses a config."""
    wheel.extractall(tmp_path / 'site')
    bases = (
        'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
        'mmdistill_ext::plain/fpn_r18-w16_600_camvid-192x256.py',
    )
    for index, base in enumerate(bases):
        (tmp_path / f'{index}.py').write_text(f'_base_ = {base!r}\n')
    script = tmp_path / 'scripts/train.py'
    script.parent.mkdir()
    (script.parent / 'beside.py').write_text('word = "beside"\n')
    script.write_text(
        'import argparse\n'
        'from beside import word\n'
        'from mmengine.config import Config\n'
        "if __name__ == '__main__':\n"
        '    parser = argparse.ArgumentParser()\n'
        "    parser.add_argument('configs', nargs='+')\n"
        "    parser.add_argument('--amp', action='store_true')\n"
        '    args = parser.parse_args()\n'
        '    for path in args.configs:\n'
        '        cfg = Config.fromfile(path)\n'
        '        print(cfg.model.type)\n'
        "    assert '_scope_' not in cfg.visualizer\n"  # of our config: the default scope builds it
        '    print(args.amp, word, parser.prog)\n'
    )
    done = subprocess.run(
        [sys.executable, '-m', 'mmdistill_ext', 'scripts/train.py', '0.py', '1.py', '--amp'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['EncoderDecoder', 'EncoderDecoder', 'True', 'beside', 'train.py']
