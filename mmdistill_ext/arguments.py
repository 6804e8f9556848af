"""Checks what a config gives to a class or function: names, and types by the annotations.

Every registered class and function of this package is checked here, so that none of them has to
look at the types of its arguments. What is annotated ``bool`` takes True or False, ``int`` an
integer, ``float`` a number, ``str | None`` a string or None, ``dict`` and ``list`` such, and their
items too where the annotation says what they are. Without an annotation, anything is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Checked = TypeVar('Checked', bound=Callable)

CHECKED = 'checks_arguments'
"""Attribute of functions that check their arguments already."""
NAMES: dict[Any, str] = {
    bool: 'True or False',
    int: 'an integer',
    float: 'a number',
    str: 'a string',
    NoneType: 'None',
    dict: 'a dict',
    list: 'a list',
}
"""What the types of values are called in errors."""


def check_calls(call: Checked, key_of: Callable[[str], str] = lambda name: '') -> Checked:
    """Let a class or function check the arguments of every call.

    Args:
        call: A class, changed in place, or a function.
        key_of: From the name of the class or function to the config key of its arguments.

    Returns:
        The class, or a function around the given one.
    """
    if not inspect.isclass(call):
        return _checked(call, lambda *args: key_of(call.__name__))
    if '__init__' in vars(call):

        def key_for(made: Any, *args: Any) -> str | None:
            """None in the call of a base class, whose arguments are no config's."""
            if inspect.unwrap(type(made).__init__) is not inspect.unwrap(call.__init__):
                return None
            return key_of(type(made).__name__)

        call.__init__ = _checked(call.__init__, key_for)  # type: ignore[method-assign]
    return call


def _checked(function: Any, key_of: Callable[..., str | None]) -> Any:
    if getattr(function, CHECKED, False):
        return function
    parameters = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        key = key_of(*args)
        if key is not None:
            positional = dict(zip(parameters, args, strict=False))
            check_arguments(function, {**positional, **kwargs}, key)
        return function(*args, **kwargs)

    setattr(checked, CHECKED, True)
    return checked


def check_arguments(
    call: Callable, given: Mapping[str, Any], key: str, left_out: Sequence[str] = ()
) -> None:
    """Refuse arguments that a class or function does not have, lacks, or has of another type.

    Args:
        call: A class or function.
        given: Name -> value.
        key: The config key that holds the arguments; ``''`` for those of the model.
        left_out: Arguments that are not given by a config.

    Raises:
        ValueError: The message names the key, the rule, and what was found.

    Example:
        >>> def blur(radius: int, wrap: bool = False): ...
        >>> check_arguments(blur, dict(radius=2, wrap='no'), 'image')
        Traceback (most recent call last):
        ValueError: `image.wrap` should be True or False. Found 'no'.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(call).parameters.items()
        if name not in left_out
    }
    if inspect.isfunction(call) and next(iter(parameters), '') == 'self':
        parameters.pop('self')
        given = {name: value for name, value in given.items() if name != 'self'}
        name = call.__qualname__.rpartition('.')[0]
    else:
        name = getattr(call, '__name__', str(call))
    kinds = {parameter.kind for parameter in parameters.values()}
    if Parameter.VAR_KEYWORD not in kinds:
        _check_names(name, parameters, given, key)
    for required, parameter in parameters.items():
        positional = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if parameter.default is Parameter.empty and not positional and required not in given:
            raise ValueError(
                f'`{join(key, required)}` should be given: {name} needs it. Found '
                f'{", ".join(map(str, given)) or "nothing"}.'
            )
    for argument, annotation in _annotations(call).items():
        if argument in given and not fits(given[argument], annotation):
            raise ValueError(
                f'`{join(key, argument)}` should be {described(annotation)}. '
                f'Found {shown(given[argument])}.'
            )


def _check_names(
    name: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any], key: str
) -> None:
    for unknown in (argument for argument in given if argument not in parameters):
        found = shown(given[unknown])
        inside = _find_below(given, unknown)
        near = get_close_matches(str(unknown), parameters, 1)
        if inside:
            hint = f': `{join(key or "model", inside)}` is where it belongs'
        else:
            hint = f': is it `{near[0]}`?' if near else ''
        raise ValueError(
            f'`{join(key if not inside else key or "model", str(unknown))}` should be an argument '
            f'of {name}: {", ".join(parameters) or "it has none"}. Found {found}{hint}'
            f'{"" if near and not inside else "."}'
        )


def _find_below(given: Mapping[str, Any], name: str, depth: int = 2) -> str:
    """Path of a key inside of the given dicts, as one who left out their names means it."""
    for outer, value in given.items():
        if not isinstance(value, Mapping):
            continue
        if name in value:
            return f'{outer}.{name}'
        below = _find_below(value, name, depth - 1) if depth > 1 else ''
        if below:
            return f'{outer}.{below}'
    return ''


def _annotations(call: Callable) -> dict[str, Any]:
    function = call.__init__ if inspect.isclass(call) else call
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return {}
    try:
        annotations = inspect.get_annotations(function, eval_str=True)
    except NameError:  # a name that is imported for type checkers only
        return {}
    return {name: annotation for name, annotation in annotations.items() if name != 'return'}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the annotated type; True if the annotation says nothing of it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    plain = origin or annotation
    if plain is None or plain is NoneType:
        return value is None
    if not isinstance(plain, type) or plain in (object, Any):
        return True
    if plain in (int, float):
        numbers = int if plain is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if issubclass(plain, Mapping):
        return isinstance(value, Mapping) and (
            len(inner) < 2 or all(fits(item, inner[1]) for item in value.values())
        )
    if plain is not str and issubclass(plain, Sequence):
        items = isinstance(value, (list, tuple))
        return items and (not inner or all(fits(item, inner[0]) for item in value))
    return isinstance(value, plain)


def described(annotation: Any) -> str:
    """What an annotation allows, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        parts = list(dict.fromkeys(map(described, inner)))
        return ' or '.join(parts)
    if origin is Literal:
        return f'one of {", ".join(map(str, inner))}'
    plain = origin or annotation
    if isinstance(plain, type) and plain is not str:
        plain = dict if issubclass(plain, Mapping) else plain
        plain = list if issubclass(plain, Sequence) else plain
    name = NAMES.get(plain, getattr(plain, '__name__', str(plain)))
    contents = inner[1:] if plain is dict else inner[:1]
    return f'{name} of values that are each {described(contents[0])}' if contents else name


def shown(value: Any) -> str:
    """A value as errors show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f'{text[:200]}...'


def join(*keys: str) -> str:
    """Config keys as one, joined by dots; empty ones are left out."""
    return '.'.join(str(key) for key in keys if key != '')
