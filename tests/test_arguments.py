"""What a config gives to a class or function: names, and types by the annotations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from mmdistill_ext.arguments import check_arguments, check_calls, described, fits
from mmdistill_ext.registry import CheckedRegistry

YES = {
    bool: (True, False),
    int: (0, -3),
    float: (1, 2.5, math.nan),
    str: ('', 'a'),
    None: (None,),
    dict: ({}, dict(a=1)),
    dict[str, float]: ({}, dict(a=1, b=0.5)),
    dict[str, list[dict]]: (dict(a=[], b=[{}]),),
    Mapping[str, int] | None: (None, dict(a=1)),
    list[str]: ([], ['a'], ('a',)),
    list[str] | None: (None, ['a']),
    Sequence[float]: ([1, 2.5], (1,)),
    tuple[str, ...]: (['a'],),
    dict | str: ('a', {}),
    dict | list[dict] | None: (None, {}, [{}]),
    Literal['a', 'b']: ('a',),
    Any: (None, 1, 'a', object()),
}
NO = {
    bool: (0, 1, None, 'no', 'False', [], 1.0),
    int: (True, 1.0, '1', None, math.nan),
    float: (True, '1.0', None, [1.0]),
    str: (None, 1, ['a'], {}),
    None: (0, False, '', []),
    dict: (None, [], 'a', [('a', 1)]),
    dict[str, float]: (dict(a='1'), [1.0]),
    dict[str, list[dict]]: (dict(a={}), dict(a=[1])),
    Mapping[str, int] | None: (dict(a=1.5), 0, []),
    list[str]: ('abc', [1], {}, None),
    list[str] | None: ('abc', [None]),
    Sequence[float]: ('12', ['a'], [True], 1.0),
    tuple[str, ...]: ('a', [1]),
    dict | str: (None, [], 1),
    dict | list[dict] | None: ('a', ['a'], 0),
    Literal['a', 'b']: ('c', None),
}


@pytest.mark.parametrize(
    ('annotation', 'value', 'fit'),
    [(kind, value, True) for kind, values in YES.items() for value in values]
    + [(kind, value, False) for kind, values in NO.items() for value in values],
)
def test_values_fit_annotations(annotation, value, fit):
    assert fits(value, annotation) is fit


def test_annotations_are_described():
    assert described(bool | None) == 'True or False or None'
    assert described(dict[str, float]) == 'a dict of values that are each a number'


def blur(radius: int, /, *, wrap: bool = False, **more: float) -> None:
    """What any names may be given to."""


@dataclass(frozen=True)
class Base:
    size: int
    by: str = 'a'


def build(model: dict, losses: dict, rate: float = 1.0) -> None:
    """A model around another."""


@pytest.mark.parametrize(
    ('call', 'given', 'message'),
    [
        (Base, dict(), '`x.size` should be given: Base needs it. Found nothing'),
        (Base, dict(size='1'), "`x.size` should be an integer. Found '1'"),
        (Base, dict(sise=1), '`x.sise` should be an argument of Base: size, by. Found 1: .*`size`'),
        (Base, dict(size=1, zzz=[3]), r'`x.zzz` should be an argument of Base.*Found \[3\]\.'),
        (blur, dict(radius=1, wrap='no'), "`x.wrap` should be True or False. Found 'no'"),
        (
            build,
            dict(model=dict(decode_head={}), losses={}, decode_head=dict(num_classes=2)),
            '`x.decode_head` should be an argument of build.*`x.model.decode_head` is where it bel',
        ),
        (
            build,
            dict(model={}, losses=dict(kd=dict(weight=1)), weight=2),
            '`x.weight` .*`x.losses.kd.weight` is where it belongs',
        ),
    ],
)
def test_wrong_arguments_are_named(call, given, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(call, given, 'x')


def test_any_name_is_taken_where_the_function_takes_any():
    check_arguments(blur, dict(radius=1, other=2), 'x')


def test_classes_and_functions_check_every_call():
    @check_calls
    def double(size: int) -> int:
        return 2 * size

    assert double(2) == double(size=2) == 4
    for call in (lambda: double('2'), lambda: double(size='2')):
        with pytest.raises(ValueError, match='`size` should be an integer'):
            call()


def test_a_registry_checks_its_classes_whoever_builds_them():
    registry = CheckedRegistry('part', key_of=str)

    @registry.register_module()
    class Part:
        def __init__(self, size: int = 1) -> None:
            self.size = size

    @registry.register_module()
    class Wide(Part):
        def __init__(self, size: int = 2, by: str = 'a') -> None:
            super().__init__(size)

    class Plain(Wide):
        pass

    assert (Part().size, Wide(3).size, Plain(by='b').size) == (1, 3, 2)
    for kind in (Part, Wide, Plain):
        with pytest.raises(ValueError, match=f'`{kind.__name__}.size` should be an integer'):
            kind(size='1')
    with pytest.raises(ValueError, match='`key.size` should be an integer'):
        registry.build_part(dict(type='Part', size=None), 'key', 'Part')


@pytest.mark.parametrize('cfg', [None, 'Part', [], 1, {}, dict(size=1)], ids=str)
def test_what_is_no_config_is_named(cfg):
    registry = CheckedRegistry('part')
    message = r"`key` should be a config such as dict\(type='Part'\)\. Found"
    with pytest.raises(ValueError, match=message):
        registry.build_part(cfg, 'key', 'Part')


@pytest.mark.parametrize('kind', ['Nothing', '', None, 3, [], 'mmseg.Nothing', 'a.b.c.D'], ids=str)
def test_unknown_types_are_named(kind):
    registry = CheckedRegistry('part')
    with pytest.raises(ValueError, match='`key.type` should be a registered part'):
        registry.build_part(dict(type=kind), 'key', 'Part')
