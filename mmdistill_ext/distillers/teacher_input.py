"""What a teacher is given: the student's input in the teacher's normalisation and size."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModel, ImgDataPreprocessor
from torch import Tensor, nn

from mmdistill_ext.units.padding import padding_of

COLOURS = 3
"""Channels of an image whose order, BGR or RGB, means something."""


class TeacherInput(nn.Module):
    """Converts the student's normalised batch to what the teacher was trained on.

    Args:
        model: The teacher.
        cfg: Normalisation of a teacher without a preprocessor of its own, as arguments of
            mmengine's ``ImgDataPreprocessor``.
        patch_size: Sides of the input are brought to the nearest multiple of this; None leaves
            them as they are.

    Raises:
        ValueError: A value is impossible, or the model has a preprocessor beside ``cfg``.
    """

    preprocessor: ImgDataPreprocessor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, model: nn.Module, cfg: dict | None, patch_size: int | None) -> None:
        super().__init__()
        if patch_size is not None and (type(patch_size) is not int or patch_size < 1):
            raise ValueError(
                f'`teacher.patch_size` should be an integer >= 1. Found {patch_size!r}.'
            )
        self.patch_size = patch_size
        self.preprocessor = _preprocessor(model, cfg)
        self.register_buffer('scale', None, persistent=False)
        self.register_buffer('shift', None, persistent=False)
        self.flip_channels = False

    def match(self, student: BaseModel) -> None:
        """Prepare the conversion from the student's normalised input to the teacher's own.

        Raises:
            ValueError: The student has no preprocessor of mmengine's kind, or the two normalise
                other numbers of channels.
        """
        own, other = self.preprocessor, student.data_preprocessor
        if own is None:
            print_log(
                "The teacher's config has no data_preprocessor: it gets the student's input.",
                logger='current',
                level=logging.WARNING,
            )
            return
        if not hasattr(other, '_enable_normalize'):
            raise ValueError(
                '`student.data_preprocessor` should normalise its input, as that of the teacher '
                f'does. Found {type(other).__name__}.'
            )
        mean, std = _normalisation(own)
        student_mean, student_std = _normalisation(other)
        lengths = {len(values) for values in (mean, std, student_mean, student_std)} - {1}
        if len(lengths) > 1:
            raise ValueError(
                "`teacher` should be a model of the student's images: its `data_preprocessor.mean` "
                f'should have as many values. Found {len(mean)}, {len(student_mean)} in `student`.'
            )
        self.flip_channels = _flips_channels(own) != _flips_channels(other)
        if self.flip_channels and len(student_mean) == COLOURS:
            student_mean, student_std = student_mean.flip(0), student_std.flip(0)
        same = bool((mean == student_mean).all() and (std == student_std).all())
        if self.flip_channels or not same or _pad_value(own) != _pad_value(other):
            self.scale = student_std / std
            self.shift = (student_mean - mean) / std

    def forward(self, inputs: Tensor, data_samples: list | None) -> Tensor:
        """Convert and resize a batch.

        Args:
            inputs: ``(B, C, H, W)``, in the student's normalisation, padded.
            data_samples: The batch's data samples, for the size of each image's padding.
        """
        return self.to_patches(self.convert(inputs, data_samples))

    def to_patches(self, inputs: Tensor) -> Tensor:
        """The input at the nearest size that is made of whole patches."""
        size = self.patched_size(inputs.shape[2:])
        if size == tuple(inputs.shape[2:]):
            return inputs
        return F.interpolate(inputs, size, mode='bilinear', antialias=True)

    def patched_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Height and width that an input of this size is resized to."""
        patch = self.patch_size or 1
        return tuple(max(1, round(side / patch)) * patch for side in size)

    def patches(self, size: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of the patches of a batch of this size; None without patches."""
        if self.patch_size is None:
            return None
        height, width = self.patched_size(size)
        return height // self.patch_size, width // self.patch_size

    def convert(self, inputs: Tensor, data_samples: list | None) -> Tensor:
        """The student's input in the teacher's normalisation and channel order."""
        if self.scale is None or self.shift is None:
            return inputs
        if self.flip_channels and inputs.shape[1] == COLOURS:  # no framework swaps others
            inputs = inputs.flip(1)
        inputs = inputs * self.scale + self.shift
        value = _pad_value(self.preprocessor)
        height, width = inputs.shape[2:]
        for image, sample in zip(inputs, data_samples or (), strict=bool(data_samples)):
            left, right, top, bottom = padding_of(sample.metainfo, (height, width))
            image[:, :, width - right :] = value
            image[:, height - bottom :] = value
            image[:, :, :left] = value
            image[:, :top] = value
        return inputs


def _preprocessor(model: nn.Module, cfg: dict | None) -> ImgDataPreprocessor | None:
    """What the model's input is normalised by; None when nothing says so."""
    its_own = getattr(model, 'data_preprocessor', None)
    if hasattr(its_own, '_enable_normalize'):
        if cfg is not None:
            raise ValueError(
                '`teacher.data_preprocessor` is for a model without one. Found that of '
                f'{type(model).__name__} beside {cfg!r}.'
            )
        return its_own
    if cfg is None:
        return None
    try:
        return ImgDataPreprocessor(**{k: v for k, v in cfg.items() if k != 'type'})
    except (TypeError, AssertionError) as error:
        raise ValueError(
            '`teacher.data_preprocessor` should have the arguments of ImgDataPreprocessor (mean, '
            f'std, bgr_to_rgb). Found {cfg!r}: {error}'
        ) from error


def _pad_value(preprocessor: ImgDataPreprocessor) -> float:
    """Value that a preprocessor pads with, under mmseg's or mmengine's name for it."""
    return getattr(preprocessor, 'pad_val', getattr(preprocessor, 'pad_value', 0))


def _flips_channels(preprocessor: ImgDataPreprocessor) -> bool:
    """Whether a preprocessor swaps BGR and RGB; mmseg 1.2 names this unlike its fork and mmdet."""
    public = getattr(preprocessor, 'channel_conversion', False)
    return bool(getattr(preprocessor, '_channel_conversion', public))


def _normalisation(preprocessor: ImgDataPreprocessor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, ``(C, 1, 1)``, or ``(1, 1, 1)`` for all channels."""
    if not preprocessor._enable_normalize:
        return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)  # for any number of channels
    return preprocessor.mean.detach().cpu(), preprocessor.std.detach().cpu()
