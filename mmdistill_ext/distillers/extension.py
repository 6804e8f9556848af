"""Turn a built model into one that trains with something besides its labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from mmdistill_ext.arguments import CHECKED, check_calls
from mmdistill_ext.registry import MODELS

INNER_MODELS: dict[str, str] = {}
"""Registered name of an extension -> key of its config that holds the model it extends."""
SET_TO_NONE = ('pretrained', 'train_cfg')
"""What ``mmseg.apis.init_model`` and tools of both frameworks set to None in any model's config."""


def register_extension(name: str, inner: str) -> Callable:
    """Register a function that builds a model and extends it; extensions stack.

    Args:
        name: The ``type`` of the extension in a config, under the scope ``mmdistill_ext``.
        inner: The argument that holds the config of the extended model, which is what is exported,
            without the extension.

    Example:
        >>> from mmdistill_ext.distillers.build import build_model
        >>> class TwiceModel:
        ...     def forward(self, inputs, data_samples=None, mode='tensor'):
        ...         found = super().forward(inputs, data_samples, mode)
        ...         return {k: 2 * v for k, v in found.items()} if mode == 'loss' else found
        >>> @register_extension('TwiceTraining', inner='model')
        ... def build_twice(model, data_preprocessor=None):
        ...     return extend(build_model(model), TwiceModel)
    """

    def register(build: Callable) -> Callable:
        checked = check_calls(build)

        @wraps(build)
        def build_extension(*args: Any, **kwargs: Any) -> nn.Module:
            return checked(*args, **without_nones(kwargs))

        setattr(build_extension, CHECKED, True)  # above, without what is None
        INNER_MODELS[name] = inner
        return MODELS.register_module(name)(build_extension)

    return register


def without_nones(arguments: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments without what frameworks set to None in a config read for inference."""
    return {k: v for k, v in arguments.items() if k not in SET_TO_NONE or v is not None}


def extend(model: nn.Module, mixin: type, **state: object) -> nn.Module:
    """Mix a class into that of a built model, in place.

    The object stays the model it was: parameter names, checkpoint keys, attributes, optimizer
    groups, validation and every hook see the plain model. (PyTorch's FSDP2 and
    ``torch.nn.utils.parametrize`` extend modules in the same way.)

    Args:
        model: The model, extended already or not.
        mixin: What goes before the model's class; its methods reach the model's by ``super()``.
        **state: Attributes that the mixin needs.

    Returns:
        The model.

    Raises:
        ValueError: The model has an attribute of such a name already.
    """
    taken = [name for name in state if hasattr(model, name)]
    if taken:
        raise ValueError(
            f'{mixin.__name__} needs attributes that the model should not have. Found {taken} in a '
            f'{type(model).__name__}.'
        )
    kind = type(model)
    name = f'{mixin.__name__.removesuffix("Model")}{kind.__name__}'
    model.__class__ = type(name, (mixin, kind), {'__module__': mixin.__module__})
    for key, value in state.items():
        setattr(model, key, value)
    return model
