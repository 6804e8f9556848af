"""One dry forward of a model at the start, to see what its taps give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdistill_ext.compat import has_framework
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.tap_paths import Tap
from mmdistill_ext.taps import Call

SIZE = (256, 320)
"""Height and width of the dry image; they differ, so that the two axes cannot be mixed up."""


@dataclass(frozen=True)
class Probe:
    """Calls of a dry forward with one image.

    Attributes:
        size: Height and width of the image.
        calls: Path -> its calls.
    """

    size: tuple[int, int]
    calls: dict[str, list[Call]]

    def of(self, tap: Tap, key: str) -> list[Call]:
        """The calls of a tap.

        Raises:
            ValueError: The forward did not reach the tap; the message names the key.
        """
        if not self.calls[tap.call]:
            raise ValueError(
                f"`{key}` should be called while the model predicts. Found '{tap.call}', which is "
                'not.'
            )
        return self.calls[tap.call]


def dry_sizes(student: nn.Module) -> list[tuple[int, int]]:
    """Sizes of a dry image to try: a small one, then that of the config, which a model may need."""
    size = getattr(getattr(student, 'data_preprocessor', None), 'size', None)
    return [SIZE, tuple(size)] if size else [SIZE]


def dry_batch(student: nn.Module, size: tuple[int, int]) -> tuple[Tensor, list[BaseDataElement]]:
    """One black image, as the student's preprocessor would give it, and its data sample."""
    preprocessor = getattr(student, 'data_preprocessor', None)
    mean = getattr(preprocessor, 'mean', None)
    inputs = torch.zeros(1, 3 if mean is None else len(mean), *size)
    meta = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
    )
    return inputs, [_sample_type(student)(metainfo=meta)]


def probe(
    model: nn.Module,
    forward: Callable[[dict[str, int | None]], dict[str, list[Call]]],
    paths: Iterable[str],
    size: tuple[int, int],
    what: str,
) -> Probe:
    """Run a model once in eval mode, without changing it or drawing random numbers.

    Args:
        model: The model.
        forward: Runs it and records the wanted calls.
        paths: Dotted paths to record.
        size: Height and width of the image.
        what: ``'student'`` or ``'teacher'``, for errors.

    Raises:
        ValueError: The forward fails.
    """
    try:
        with eval_mode(model), isolated_rng():
            return Probe(size, forward(dict.fromkeys(paths)))
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f'A forward of the {what} with one image of {size[0]}x{size[1]} should '
            f'show what its taps give. It fails: {error}'
        ) from error


def _sample_type(model: nn.Module) -> type[BaseDataElement]:
    if has_framework('mmseg'):
        from mmseg.models.segmentors import BaseSegmentor
        from mmseg.structures import SegDataSample

        if isinstance(model, BaseSegmentor):
            return SegDataSample
    if has_framework('mmdet'):
        from mmdet.structures import DetDataSample

        return DetDataSample
    return BaseDataElement
