"""Who may import whom. Read from the source, with imports in functions and for types."""

import sys
from pathlib import Path

from tests.imports import Arrow, circles, imports_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'mmdistill_ext'

# A row imports from the rows above it. Modules of one row do not import each other; inside a
# package they may, without a circle.
LAYERS = (
    ('functional',),
    ('config_scopes', 'arguments', 'version'),
    ('error_keys', 'checkpoint_content', 'download'),
    ('registry',),
    ('compat',),
    ('safe_loading',),
    ('checkpoint', 'isolation', 'taps'),
    ('tap_paths',),
    ('policies', 'connectors'),
    ('units',),
    ('losses',),
    ('preprocessing', 'transforms', 'evaluation', 'optim'),
    ('distillers',),
    ('visualization',),
    ('dataset_configs', 'network_scores', 'package_types'),
    ('round_loader', 'single_network', 'config_access', 'first_checkpoint', 'work_dir'),
    ('plain_config',),
    ('export',),
    ('hooks',),
    ('cli', '__main__'),
)
# Circles by imports for types alone, which Python does not mind.
CIRCLES_OF_TYPES: tuple[set[str], ...] = ()
ALLOWED_IN_FUNCTIONAL = {*sys.stdlib_module_names, 'torch'}

MODULES, ARROWS = imports_of(ROOT, PACKAGE)
INSIDE = [arrow for arrow in ARROWS if arrow.target.split('.')[0] == PACKAGE]


def room(module: str) -> str:
    """``mmdistill_ext.units.dense.pair`` is in ``units``; the package itself is in no room."""
    return [*module.split('.'), ''][1]


def layer(module: str) -> int:
    return next((i for i, row in enumerate(LAYERS) if room(module) in row), -1)


def listed(arrows: list[Arrow]) -> str:
    return '\n'.join(map(str, arrows))


def test_every_module_has_a_layer():
    unknown = {room(module) for module in MODULES if module != PACKAGE and layer(module) < 0}
    assert not unknown, f'`LAYERS` in {Path(__file__).name} should name {sorted(unknown)}'


def test_imports_point_to_layers_above():
    upward = [
        arrow
        for arrow in INSIDE
        if arrow.source != PACKAGE
        and room(arrow.source) != room(arrow.target)
        and layer(arrow.source) <= layer(arrow.target)
    ]
    assert not upward, f'Imports from a layer that is not above, see `LAYERS`:\n{listed(upward)}'


def test_nobody_imports_the_whole_package():
    whole = [arrow for arrow in INSIDE if arrow.target == PACKAGE and arrow.source != PACKAGE]
    assert not whole, f'Imports of what the package itself imports:\n{listed(whole)}'


def test_functional_needs_torch_alone():
    arrows = [arrow for arrow in ARROWS if room(arrow.source) == 'functional']
    foreign = [
        arrow
        for arrow in arrows
        if arrow.target.split('.')[0] not in ALLOWED_IN_FUNCTIONAL
        and room(arrow.target) != 'functional'
    ]
    assert len(arrows) > 20
    assert not foreign, f'`functional` imports torch and itself:\n{listed(foreign)}'


def test_no_modules_import_each_other_in_a_circle():
    known = [{f'{PACKAGE}.{name}' for name in circle} for circle in CIRCLES_OF_TYPES]
    found = [
        circle for circle in circles(INSIDE) if {arrow.source for arrow in circle} not in known
    ]
    assert not found, 'Circles of imports:\n' + '\n\n'.join(map(listed, found))


def test_no_test_module_imports_another():
    """What tests share is in a module without tests, or a fixture in a ``conftest.py``."""
    _, arrows = imports_of(ROOT, 'tests')
    between = [arrow for arrow in arrows if arrow.target.split('.')[-1].startswith('test_')]
    assert len(arrows) > 100
    assert not between, f'Imports of a test module:\n{listed(between)}'
