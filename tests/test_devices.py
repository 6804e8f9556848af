"""The option ``--device``: it takes effect where it says, and only there."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.devices import on_device

ROOT = Path(__file__).resolve().parents[1]
META = torch.device('meta')
ASKS = """
import pytest
import torch

AT_THE_TOP = str(torch.get_default_device())


@pytest.fixture(scope='module')
def made():
    return str(torch.get_default_device())


@pytest.mark.parametrize('parameter', [str(torch.get_default_device())])
def test_it(parameter, made, device):
    here = str(torch.get_default_device())
    print('ASKED', AT_THE_TOP, parameter, made, here, device)
"""


def pytest_with(*arguments, cwd=ROOT):
    command = [sys.executable, '-m', 'pytest', '-q', '-s', '-n', '0', *arguments]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A folder with this suite's conftest.py and helpers, and a test that asks in each folder."""
    folder = tmp_path_factory.mktemp('copy')
    shutil.copy(ROOT / 'pyproject.toml', folder)
    shutil.copytree(ROOT / 'mmdistill_ext', folder / 'mmdistill_ext', symlinks=True)
    (folder / 'tests').mkdir()
    for helper in (ROOT / 'tests').glob('*.py'):
        if not helper.name.startswith('test_'):
            shutil.copy(helper, folder / 'tests')
    for name in ('functional', 'losses/logits', 'hooks'):
        (folder / 'tests' / name).mkdir(parents=True)
        (folder / 'tests' / name / 'test_asks.py').write_text(ASKS)
    return folder


@pytest.mark.parametrize('device', ['cpu', 'cpu:0'])
def test_the_option_reaches_modules_fixtures_and_tests_of_its_folders(copy, device):
    done = pytest_with(f'--device={device}', 'tests', cwd=copy)
    assert done.returncode == 0, done.stdout
    found = [line.split('ASKED ')[1].split() for line in done.stdout.splitlines() if 'ASK' in line]
    assert sorted(found) == sorted([[device] * 5] * 2 + [['cpu'] * 4 + [device]])


def test_a_device_that_is_not_there_is_refused():
    done = pytest_with('--device=no-such-device', 'tests/functional/test_checks.py')
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert 'ERROR: --device no-such-device: ' in done.stderr


def test_tensors_are_made_on_the_device_and_the_default_comes_back():
    generator = torch.Generator().manual_seed(0)
    with on_device(META):
        made = [
            torch.zeros(2),
            torch.tensor([1.0]),
            torch.randn(2, generator=generator),
            torch.randint(0, 3, (2,), generator=generator),
            torch.as_tensor(np.zeros(2)),
            torch.rand(2, requires_grad=True),
        ]
    assert {x.device for x in made} == {META}
    assert made[-1].is_leaf
    assert made[-1].requires_grad
    assert torch.zeros(2).device.type == torch.get_default_device().type == 'cpu'


def test_random_numbers_are_those_of_the_cpu():
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    with on_device(torch.device('cpu:0')):
        found = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)
