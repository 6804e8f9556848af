"""The reading of imports that guards the layers sees every kind of them."""

import pytest

from tests.imports import circles, imports_of

FILES = {
    '__init__.py': 'from p import a\n',
    'a.py': 'import torch.nn\n\nfrom p.b.c import name, other\n',
    'b/__init__.py': '',
    'b/c.py': (
        'from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from p.d import D\n'
        '\n\ndef f():\n    from . import e\n'
    ),
    'b/e.py': 'from ..d import D\n',
    'd.py': 'import p.a\n',
}


@pytest.fixture
def read(tmp_path):
    (tmp_path / 'p/b').mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / 'p' / name).write_text(text)
    return imports_of(tmp_path, 'p')


def test_every_import_is_an_arrow_with_its_place(read):
    modules, arrows = read
    assert modules == {'p', 'p.a', 'p.b', 'p.b.c', 'p.b.e', 'p.d'}
    assert sorted(map(str, arrows)) == [
        'p/__init__.py:1: p -> p.a',
        'p/a.py:1: p.a -> torch.nn',
        'p/a.py:3: p.a -> p.b.c',
        'p/b/c.py:1: p.b.c -> typing.TYPE_CHECKING',
        'p/b/c.py:4: p.b.c -> p.d',
        'p/b/c.py:8: p.b.c -> p.b.e',
        'p/b/e.py:1: p.b.e -> p.d',
        'p/d.py:1: p.d -> p.a',
    ]


def test_circles_are_found_by_any_arrow(read):
    found = [{arrow.source for arrow in circle} for circle in circles(read[1])]
    assert {'p.a', 'p.b.c', 'p.d'} in found
    assert {'p.a', 'p.b.c', 'p.b.e', 'p.d'} in found
    assert len(found) == 2
