"""Capture what chosen modules and methods take and return in a forward, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn


def resolve(root: nn.Module, path: str, key: str) -> tuple[Any, str]:
    """Find the callable behind a dotted path; a module stands for its ``forward``.

    Args:
        root: The model that the path starts from.
        path: Dotted path such as ``'decode_head'``, ``'auxiliary_head.0'`` or
            ``'bbox_head.loss_by_feat'``.
        key: The config key to name in errors.

    Returns:
        The owner and the name of the method.

    Raises:
        ValueError: Part of the path does not exist, or the end is not callable.
    """
    owner: Any = None
    target: Any = root
    walked = type(root).__name__
    for part in path.split('.'):
        found = find_child(target, part)
        if found is None:
            children = getattr(target, '_modules', {})
            known = ', '.join(children) or 'no submodules'
            raise ValueError(
                f"`{key}` should be a dotted path to a module or method. Found '{path}': "
                f"{walked} has no '{part}', only: {known}."
            )
        owner, target, walked = target, found, f'{walked}.{part}'
    if isinstance(target, nn.Module):
        return target, 'forward'
    if not callable(target):
        raise ValueError(
            f"`{key}` should lead to a module or method. Found '{path}', a {type(target)}."
        )
    return owner, path.rsplit('.', 1)[-1]


def find_child(target: Any, part: str) -> Any:
    """A submodule or attribute; None where there is none."""
    children = getattr(target, '_modules', {})
    return children[part] if part in children else getattr(target, part, None)


@contextmanager
def wrapped(owner: Any, method: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace a method of one object, or a module's ``forward``, by ``wrap(method)`` for a while.

    Args:
        owner: The object.
        method: Name of the method.
        wrap: Takes the present method, returns what is called instead.
    """
    previous = owner.__dict__.get(method)
    owner.__dict__[method] = wrap(getattr(owner, method))
    try:
        yield
    finally:
        if previous is None:
            del owner.__dict__[method]
        else:
            owner.__dict__[method] = previous


@dataclass
class Call:
    """One recorded call.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned; None while it runs.
        version: Version counter of the tensor that it returned, which in-place changes increase.
        function: What was called.
        derived: What was worked out from the output, for all who want it; gone with the call.
    """

    args: tuple
    kwargs: dict
    output: Any = None
    version: int | None = None
    function: Callable | None = None
    derived: dict[str, Any] = field(default_factory=dict)


class Seen(Exception):
    """Ends a forward once every wanted call has been recorded."""


class Taps:
    """Context manager that records the calls of modules and methods.

    Methods are wrapped on the instance, modules through their ``forward``, because the heads of
    mmseg and mmdet are mostly called by method, where forward hooks do not fire. On leaving, also
    by an exception, every wrapper is gone; the records live until :meth:`clear` or the next entry.

    Args:
        root: The model.
        paths: Name -> dotted path (see :func:`resolve`).
        replace: Dotted path of a method -> what to call instead of it.
        key: The config key to name in errors.
        stop_after: Name -> number of calls. Once all of these were recorded the forward ends, and
            so does the ``with`` block, without an error.

    Raises:
        ValueError: A path does not exist.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> with Taps(model, dict(hidden='0'), stop_after=dict(hidden=1)) as taps:
        ...     _ = model(torch.zeros(2, 4))  # the ReLU does not run
        >>> taps['hidden'].output.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        root: nn.Module,
        paths: Mapping[str, str],
        replace: Mapping[str, Callable] | None = None,
        key: str = 'tap',
        stop_after: Mapping[str, int] | None = None,
    ) -> None:
        self._targets = {
            name: (path, *_entrance(*resolve(root, path, key))) for name, path in paths.items()
        }
        self._replace = [(*resolve(root, path, key), new) for path, new in (replace or {}).items()]
        self._stop_after = dict(stop_after or {})
        self._records: dict[str, list[Call]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Taps:
        self._records = {name: [] for name in self._targets}
        self._missing = dict(self._stop_after)
        for owner, method, new in self._replace:
            self._undo.enter_context(wrapped(owner, method, partial(_instead, new)))
        for name, (_, owner, method) in self._targets.items():
            recorder = partial(self._recorder, name=name)
            self._undo.enter_context(wrapped(owner, method, recorder))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._undo.close()
        seen = isinstance(error, Seen) and error.args[0] is self
        if kind is not None and not seen:
            self.clear()
        return seen

    def __getitem__(self, name: str) -> Call:
        """The only call; ``RuntimeError`` when there were none or several."""
        calls = self._records[name]
        if len(calls) != 1:
            raise RuntimeError(
                f"Tap '{name}' on '{self._targets[name][0]}' should see one call per step. "
                f'Found {len(calls)}.'
            )
        return calls[0]

    def owner(self, name: str) -> Any:
        """The object whose method is tapped, a part of this model even if it is a copy."""
        return self._targets[name][1]

    def all(self, name: str) -> list[Call]:
        """All calls, in order."""
        return self._records[name]

    def clear(self) -> None:
        """Drop the records, so that no activation outlives the step."""
        self._records = {name: [] for name in self._targets}

    def _recorder(self, call: Callable, name: str) -> Callable:
        record = self._records[name]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            recorded = Call(args, kwargs, function=call)
            record.append(recorded)
            recorded.output = output = call(*args, **kwargs)
            if isinstance(output, Tensor) and not output.is_inference():
                recorded.version = output._version
            if name in self._missing:
                self._missing[name] -= 1
                if max(self._missing.values()) <= 0:
                    raise Seen(self)
            return output

        return wrapper


def _instead(new: Callable, previous: Callable) -> Callable:
    return new


def _entrance(owner: Any, method: str) -> tuple[Any, str]:
    """Where calls are recorded; for a compiled module this is outside of its compiled part."""
    compiled = method == 'forward' and getattr(owner, '_compiled_call_impl', None) is not None
    return owner, '_compiled_call_impl' if compiled else method
