"""Per-pixel heads of segmenters: how to find one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mmdistill_ext.taps import resolve
from mmdistill_ext.units.pixel import mmseg_heads  # noqa: F401  registers those of mmseg
from mmdistill_ext.units.pixel.head_logits import HeadLogits, logits_of

MAIN, AUXILIARY = 'decode_head', 'auxiliary_head'


class FoundHead(NamedTuple):
    """A head of a segmentor.

    Attributes:
        path: Its path, to one head of a list.
        logits: How its logits are read.
    """

    path: str
    logits: HeadLogits

    @property
    def output(self) -> str:
        """Path of the module or method whose call shows what the head predicts with."""
        method = self.logits.output_method
        return self.path if method == 'forward' else f'{self.path}.{method}'

    @property
    def loss(self) -> str:
        """Path of the method that is given what the head's loss is formed of."""
        return f'{self.path}.{self.logits.loss_method}'


def find_head(model: nn.Module, path: str, key: str) -> FoundHead:
    """The per-pixel head at a path.

    Of a cascade it is the last stage, which predicts; of several auxiliary heads the first.

    Raises:
        ValueError: The path leads nowhere, or to no head with logits per pixel; the message names
            the key.
    """
    head, _ = resolve(model, path, key)
    if isinstance(head, nn.ModuleList) and len(head) and path in (MAIN, AUXILIARY):
        path = f'{path}.{len(head) - 1 if path == MAIN else 0}'
        head, _ = resolve(model, path, key)
    return FoundHead(path, logits_of(head, path, key))


def find_map_head(model: nn.Module, key: str) -> FoundHead:
    """The last head of the model that predicts a whole map in training too.

    It is the one that the model predicts with, and of PointRend, whose last stage sees points of
    its own choice, the one before.

    Raises:
        ValueError: There is none.
    """
    head = find_head(model, MAIN, key)
    while not head.logits.every_pixel and head.path.rpartition('.')[2] not in ('0', MAIN):
        stage = int(head.path.rpartition('.')[2])
        head = find_head(model, f'{MAIN}.{stage - 1}', key)
    if not head.logits.every_pixel:
        raise ValueError(
            f'`{key}` should have a head that predicts every pixel in training. Found '
            f"'{head.path}', a {type(head.logits.head).__name__}."
        )
    return head


def check_logits(logits: object, path: str, dimensions: int = 4) -> Tensor:
    """The logits as they are; ``TypeError`` if a head gave something else than one tensor."""
    if not isinstance(logits, Tensor) or logits.ndim != dimensions:
        raise TypeError(
            f"The head at '{path}' should give one tensor of logits (B, C, H, W). "
            f'Found {type(logits).__name__}; name another head.'
        )
    return logits
