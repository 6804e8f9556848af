"""The examples of the docstrings are what happens."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.imports import module_name

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / 'mmdistill_ext').rglob('*.py'))
WITH_EXAMPLES = [file.relative_to(ROOT) for file in FILES if '>>> ' in file.read_text()]


@pytest.mark.parametrize('file', WITH_EXAMPLES, ids=str)
def test_examples_of(file):
    """Those that doctest finds, which are all that the file has."""
    module = import_module(module_name(file))
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted == len(re.findall(r'^ *>>> ', (ROOT / file).read_text(), re.MULTILINE))
    assert results.failed == 0, 'see the output above'


def test_there_are_examples():
    assert len(WITH_EXAMPLES) > 4
