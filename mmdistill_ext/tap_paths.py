"""Paths of taps: which call, its input or output, and which part of that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmdistill_ext.taps import Call, find_child, resolve

SIDES = ('input', 'output')


@dataclass(frozen=True)
class Tap:
    """Where a value is taken: a call, its input or output, and an index into that.

    Attributes:
        call: Dotted path of the module or method (see :func:`~mmdistill_ext.taps.resolve`);
            ``'forward'`` is the model's own.
        side: ``'output'``, or ``'input'`` for the call's first argument.
        index: What to select of it, one step after the other: integers for tuples, lists and the
            first axis of tensors; names for mappings, attributes and, of an input, arguments.
    """

    call: str
    side: str = 'output'
    index: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        whole = self.call == 'forward'  # of the model itself
        parts = [] if whole else [self.call]
        parts += [self.side] if whole or self.side == 'input' else []
        return '.'.join([*parts, *map(str, self.index)])

    def read(self, call: Call) -> Any:
        """Select the value from a recorded call.

        Raises:
            ValueError: The call has no such part, or what it returned was changed in place later.
        """
        changed = call.version is not None and call.output._version != call.version
        if changed and self.side == 'output':
            raise ValueError(
                f"Tap '{self}' should give what nothing changes in place afterwards (such as a "
                "ReLU with inplace=True). It was changed: tap the module that did it, its 'output'."
            )
        value, index = call.output, self.index
        if self.side == 'input':
            named = _arguments(call) if index and isinstance(index[0], str) else {}
            if named and index[0] in named:
                value, index = named[index[0]], index[1:]
            else:
                value = (*call.args, *call.kwargs.values(), None)[0]
        for part in index:
            try:
                items = hasattr(value, '__getitem__')
                value = value[part] if items else getattr(value, str(part))
            except (LookupError, TypeError, AttributeError):
                raise ValueError(
                    f"Tap '{self}' should lead to a part of what is there. Found no {part!r} in "
                    f'{_shape_of(value)}.'
                ) from None
        return value


def find_tap(root: nn.Module, path: str | None, key: str) -> Tap:
    """Read a tap's path: a module or method, perhaps ``input`` or ``output``, perhaps indices.

    ``'neck.0'`` is the first of what the neck returns, ``'decode_head.input.3'`` the fourth of the
    feature maps that the head is given, ``'output.x_norm_patchtokens'`` an entry of what the model
    itself returns. A submodule of that name comes before an index.

    Args:
        root: The model that the path starts from.
        path: The path.
        key: The config key to name in errors.

    Raises:
        ValueError: There is no such module or method.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"`{key}` should be a dotted path such as 'neck.0'. Found {path!r}.")
    parts, target, walked = path.split('.'), root, 0
    while walked < len(parts) and (child := find_child(target, parts[walked])) is not None:
        target, walked = child, walked + 1
    call, rest = '.'.join(parts[:walked]) or 'forward', parts[walked:]
    side = rest.pop(0) if rest and rest[0] in SIDES else None
    is_part = side or (walked and rest and _is_number(rest[0]))
    if rest and not is_part:
        resolve(root, path, key)  # raises, and says what there is instead
    resolve(root, call, key)
    index = tuple(int(part) if _is_number(part) else part for part in rest)
    return Tap(call, side or 'output', index)


def _arguments(call: Call) -> dict[str, Any]:
    """The arguments of a call by their names, whether they were named or not."""
    if call.function is None:
        return call.kwargs
    return inspect.signature(call.function).bind(*call.args, **call.kwargs).arguments


def _is_number(part: str) -> bool:
    return part.removeprefix('-').isdigit()


def _shape_of(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f'a {type(value).__name__} of {len(value)}'
    if isinstance(value, Mapping):
        return f'a {type(value).__name__} of {", ".join(map(str, value))}'
    return f'a {type(value).__name__}'
