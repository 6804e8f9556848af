"""A table of what reads the modules of a class, found by the nearest base class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from torch import nn

Reader = TypeVar('Reader')


class ByClass(Generic[Reader]):
    """Class of modules -> what reads them, and their subclasses (SEL-7).

    Example:
        >>> table = ByClass()
        >>> @table.register(nn.Linear)
        ... def read_linear(module):
        ...     return module.weight
        >>> table.find(nn.Linear(1, 1)) is read_linear
        True
    """

    def __init__(self) -> None:
        self._readers: dict[type[nn.Module], Reader] = {}

    def register(self, module_type: type[nn.Module]) -> Callable[[Reader], Reader]:
        """Decorator: the decorated object reads modules of this class.

        Raises:
            ValueError: The class has a reader.
        """
        if module_type in self._readers:
            raise ValueError(
                f'`register` should be called once for a class of modules. Found '
                f'{module_type.__name__} twice.'
            )

        def add(reader: Reader) -> Reader:
            self._readers[module_type] = reader
            return reader

        return add

    def base_of(self, module: object) -> type[nn.Module] | None:
        """The nearest registered base class of a module; None where there is none."""
        return next((base for base in type(module).__mro__ if base in self._readers), None)

    def find(self, module: object, methods: Iterable[str] = ()) -> Reader | None:
        """What reads a module.

        Args:
            module: The module.
            methods: Methods that should be those of the registered class: a module that overrides
                one of them would be read wrongly.

        Returns:
            None where no base class is registered, or one of the methods differs.
        """
        base = self.base_of(module)
        if base is None or not all(same_method(type(module), base, name) for name in methods):
            return None
        return self._readers[base]

    def __str__(self) -> str:
        return ', '.join(module_type.__name__ for module_type in self._readers)


def same_method(first: type, second: type, name: str) -> bool:
    """Whether two classes have the same method of this name, or both have none."""
    return getattr(first, name, None) is getattr(second, name, None)
