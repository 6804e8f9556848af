"""Which of a head's outputs are the logits that it predicts with: known once, by its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from mmdistill_ext.taps import Call
from mmdistill_ext.units.pixel.activation import Activation

NOT_IGNORED = -1
"""Label that no pixel has, for heads with ``ignore_index=None``."""
REGION_LOSSES = (
    'DiceLoss',
    'TverskyLoss',
    'LovaszLoss',
    'BoundaryLoss',
    'HuasdorffDisstanceLoss',
)
"""Losses of mmseg beside those of single pixels: what they do to logits decides only alone."""
READ_BY = ('loss', 'loss_by_feat', 'predict')
"""Methods that show what a head gives: where a class has its own, its logits have to be said."""


class HeadLogits:
    """Where the logits stand that a head predicts with, and what else is known of a head.

    This one is for heads whose ``forward`` gives one tensor. A subclass under
    :func:`register_logits` says it for others; mostly :meth:`pick` is enough.

    Args:
        head: The head.

    Attributes:
        loss_method: The head's method that is given what its loss is formed of.
        output_method: The method whose call :meth:`of_output` reads.
        every_pixel: In training the head predicts a whole map.
        refused: Why the head has no logits per pixel; None if it has.
    """

    loss_method: ClassVar[str] = 'loss_by_feat'
    output_method: ClassVar[str] = 'forward'
    every_pixel: ClassVar[bool] = True
    refused: ClassVar[str | None] = None

    def __init__(self, head: nn.Module) -> None:
        self.head: Any = head

    def pick(self, output: Any) -> Any:
        """The logits among what ``forward`` gave, in training or in eval mode."""
        return output

    def of_loss(self, call: Call) -> Tensor:
        """Logits ``(B, C, H, W)``, or ``(B, C, N)`` of N points, from a call of the loss method."""
        return self.pick(call.args[0])

    def of_output(self, call: Call) -> Tensor:
        """Logits ``(B, C, H, W)`` from a call of the output method."""
        return self.pick(call.output)

    def of_map(self, predicted: Tensor) -> Tensor:
        """Logits from the map ``(B, C, H, W)`` that the segmentor's ``inference`` gives."""
        return predicted

    def points(self, call: Call) -> Tensor | None:
        """Where the logits of :meth:`of_loss` are, ``(B, N, 2)`` in [0, 1]; None for a map."""
        return None

    @property
    def losses(self) -> list[Any]:
        """Loss modules of the logits."""
        loss = getattr(self.head, 'loss_decode', None)
        return list(loss) if isinstance(loss, nn.ModuleList) else [loss] if loss else []

    @property
    def sigmoid(self) -> bool:
        """The head predicts independent sigmoids instead of one softmax.

        One channel is a sigmoid. Else the loss of single pixels decides, of several the first; one
        of regions, such as ``DiceLoss``, only where there is no other.
        """
        if self.head.out_channels == 1:
            return True
        of_pixels = [x for x in self.losses if type(x).__name__ not in REGION_LOSSES]
        deciding = of_pixels or self.losses
        return bool(deciding) and bool(getattr(deciding[0], 'use_sigmoid', False))

    @property
    def activation(self) -> Activation:
        """What turns the logits into probabilities."""
        return Activation(self.sigmoid, self.head.out_channels)

    @property
    def num_labels(self) -> int:
        """Number of label classes: 2 for one channel, also if the config says ``num_classes=1``."""
        return 2 if self.head.out_channels == 1 else self.head.num_classes

    @property
    def ignore_index(self) -> int:
        """Label of pixels that are ignored; one that no pixel has for ``ignore_index=None``."""
        index = self.head.ignore_index
        return NOT_IGNORED if index is None else index


TABLE: dict[type[nn.Module], type[HeadLogits]] = {}


def register_logits(
    *head_types: type[nn.Module],
) -> Callable[[type[HeadLogits]], type[HeadLogits]]:
    """Decorator: heads of these classes, and classes derived from them, are read like this.

    For a head outside of this package it stands in a module that the config names under
    ``custom_imports``.

    Args:
        head_types: Classes of heads.

    Example:
        >>> class TwoMaps(nn.Module):
        ...     pass  # a head whose `forward` gives what it predicts and an edge map
        >>> @register_logits(TwoMaps)
        ... class FirstOfTwo(HeadLogits):
        ...     def pick(self, output):
        ...         return output[0]
        >>> FirstOfTwo(TwoMaps()).pick(('logits', 'edges'))
        'logits'
    """

    def add(logits: type[HeadLogits]) -> type[HeadLogits]:
        TABLE.update(dict.fromkeys(head_types, logits))
        return logits

    return add


def logits_of(head: nn.Module, path: str, key: str) -> HeadLogits:
    """How a head's logits are read.

    Args:
        head: The head.
        path: Where it is in the model, for errors.
        key: The config key to name in errors.

    Raises:
        ValueError: The head predicts no classes per pixel, or its class changes what the loss or
            the prediction is formed of without saying where the logits are.
    """
    derived: list[type] = []
    for base in type(head).__mro__:
        if base in TABLE:
            logits = TABLE[base]
            if logits.refused:
                raise ValueError(
                    f"`{key}` should lead to a head of classes. Found '{path}', a "
                    f'{type(head).__name__}, which {logits.refused}: take a loss of features '
                    "(`tap='backbone'`)."
                )
            _check_known(derived, base, path, key)
            return logits(head)
        derived.append(base)
    raise ValueError(
        f"`{key}` should lead to a per-pixel head (a subclass of mmseg's BaseDecodeHead, or one "
        f"that `register_logits` names). Found '{path}', a {type(head).__name__}."
    )


def _check_known(derived: list[type], base: type, path: str, key: str) -> None:
    changed = [f'{cls.__name__}.{name}' for cls in derived for name in READ_BY if name in vars(cls)]
    if changed:
        raise ValueError(
            f"`{key}` should lead to a head whose logits are known. Found '{path}', a "
            f'{derived[0].__name__} with {", ".join(changed)} where {base.__name__} has '
            f'another: say with `register_logits({derived[0].__name__})` which of its outputs it '
            f"predicts with (docs/segmentation.md), or take a loss of features (`tap='backbone'`)."
        )
