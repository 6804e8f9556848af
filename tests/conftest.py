"""What all tests share: the real data's folders, and settings that make runs repeatable."""

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Tiny tensors gain nothing from threads, and threads of several processes fight for the cores.
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'

import pytest
import torch
from hypothesis import settings
from mmengine.runner import set_random_seed

from tests.devices import on_device
from tests.tiny_bccd import write_coco
from tests.tiny_seg import forget_runs, write_data

TESTS = Path(__file__).parent
ON_ANY_DEVICE = ('functional', 'losses')  # folders of tests that follow `--device`

# Loaded machines are slow, and a failure must come back on the next run.
settings.register_profile('repeatable', deadline=None, derandomize=True)
settings.load_profile('repeatable')

# Memory that nobody has set is NaN: what reads it fails always, not once in a while.
torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    folders = ', '.join(f'tests/{name}' for name in ON_ANY_DEVICE)
    parser.addoption('--device', default='cpu', help=f'where {folders} make their tensors')


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there before any test runs."""
    try:
        torch.empty(1, device=config.getoption('device'))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise pytest.UsageError(f'--device {config.getoption("device")}: {error}') from error


def follows_device(path: Path) -> bool:
    return any(path.is_relative_to(TESTS / name) for name in ON_ANY_DEVICE)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Make the tensors of a module's top level, and those of its parameters, on the device."""
    follows = isinstance(collector, pytest.Module) and follows_device(collector.path)
    with on_device(torch.device(collector.config.getoption('device') if follows else 'cpu')):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Make the tensors of a test and of its fixtures on the device."""
    follows = follows_device(item.path)
    with on_device(torch.device(item.config.getoption('device') if follows else 'cpu')):
        return (yield)


def pytest_report_header() -> str:
    """Name the frameworks under test: the same suite runs on two families of them."""
    found = {dist.metadata['Name']: dist.version for dist in metadata.distributions()}
    names = [name for name in found if name.removeprefix('onedl-').startswith(('torch', 'mm'))]
    return ', '.join(f'{name} {found[name]}' for name in sorted(names))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests on real data where there is none."""
    if {'MMDISTILL_DATA', 'MMDISTILL_MODELS'} <= os.environ.keys():
        return
    left_out = [item for item in items if item.get_closest_marker('real_data')]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope='module', autouse=True)
def no_earlier_runs() -> Iterator[None]:
    """Forget mmengine's global state of other files, so that each runs as it does alone."""
    set_random_seed(0)
    forget_runs()
    yield
    forget_runs()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Let each test draw the same, whatever ran before it."""
    set_random_seed(0)


@pytest.fixture(scope='session')
def device(pytestconfig: pytest.Config) -> torch.device:
    """Return the device of ``--device``."""
    return torch.device(pytestconfig.getoption('device'))


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tiny segmentation data."""
    folder = tmp_path_factory.mktemp('data')
    for split in ('train', 'val'):
        write_data(folder, split)
    return folder


@pytest.fixture(scope='module')
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tiny detection data."""
    folder = tmp_path_factory.mktemp('coco')
    for split in ('train', 'val'):
        write_coco(folder, split)
    return folder


@pytest.fixture(scope='session')
def data_root() -> Path:
    """Return the folder of the data sets; for tests marked ``real_data``."""
    return Path(os.environ['MMDISTILL_DATA'])


@pytest.fixture(scope='session')
def models_root() -> Path:
    """Return the folder of the trained teachers; for tests marked ``real_data``."""
    return Path(os.environ['MMDISTILL_MODELS'])
