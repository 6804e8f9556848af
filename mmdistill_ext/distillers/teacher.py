"""A frozen teacher: always in eval mode, never part of the student."""

from __future__ import annotations

import logging

import torch
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from mmdistill_ext.checkpoint import load_exactly, load_weights
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.taps import Call, Taps


class Teacher(nn.Module):
    """Holds a trained model and gives its outputs without gradient.

    Building it draws no random number from the training's generators. It must not be registered as
    a child of the student (see :class:`DistilledModel`), so that it is in no checkpoint, optimizer,
    EMA copy or DDP bucket.

    Args:
        model: A model dict, a config path, or ``'mmseg::...'``.
        checkpoint: File or URL of its weights, loaded without running code.
        compile: Run its backbone and neck through ``torch.compile``.
        channels_last: Run it in channels-last memory format (faster convolutions on GPUs).

    Raises:
        FileNotFoundError: The checkpoint or the config does not exist.
        ValueError: The checkpoint is broken, unsafe, or of another model.
    """

    def __init__(
        self,
        model: dict | str,
        checkpoint: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(checkpoint, str):
            raise ValueError(
                '`teacher.checkpoint` should be the file or URL of trained weights: an untrained '
                f'teacher teaches nothing. Found {checkpoint!r}.'
            )
        with isolated_rng():
            self.model = revert_sync_batchnorm(build_model(model, 'teacher.model'))
        loaded = load_weights(checkpoint, 'teacher.checkpoint')
        load_exactly(self.model, loaded['state_dict'], f"`teacher.checkpoint`='{checkpoint}'")
        self.classes: tuple[str, ...] | None = _classes(loaded['meta'])
        self.requires_grad_(False)
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if compile:
            for part in filter(None, (self.model.backbone, getattr(self.model, 'neck', None))):
                part.compile()
        self.register_buffer('input_scale', None, persistent=False)
        self.register_buffer('input_shift', None, persistent=False)
        self.flip_channels = False
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def match_input(self, student: nn.Module) -> None:
        """Prepare the conversion from the student's normalised input to the teacher's own.

        Raises:
            ValueError: Only one of the two normalises its input.
        """
        own, other = self.model.data_preprocessor, student.data_preprocessor
        if not hasattr(own, '_enable_normalize'):
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
        self.flip_channels = _flips_channels(own) != _flips_channels(other)
        if self.flip_channels:
            student_mean, student_std = student_mean.flip(0), student_std.flip(0)
        same = torch.equal(mean, student_mean) and torch.equal(std, student_std)
        if self.flip_channels or not same or _pad_value(own) != _pad_value(other):
            self.input_scale = student_std / std
            self.input_shift = (student_mean - mean) / std

    @torch.no_grad()
    def forward(self, inputs: Tensor, data_samples: list, heads: list[str]) -> dict[str, Call]:
        """Run the teacher once and record the calls of the given heads.

        Args:
            inputs: The student's input ``(B, 3, H, W)``, normalised and padded.
            data_samples: The batch's data samples (their sizes are read, never their labels).
            heads: Dotted paths in the teacher. A head that ``mode='tensor'`` does not run (an
                auxiliary one) is called on the features. With ``'extract_feat'`` alone no head
                runs.

        Returns:
            Path -> recorded call.
        """
        inputs = self.convert(inputs, data_samples)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        features = 'extract_feat'
        with Taps(self.model, {head: head for head in (*heads, features)}) as taps:
            if set(heads) == {features}:
                self.model.extract_feat(inputs)
            else:
                self.model(inputs, data_samples, mode='tensor')
            for head in heads:
                if not taps.all(head):
                    self.model.get_submodule(head).forward(taps[features].output)
            return {head: taps.all(head)[-1] for head in heads}

    def convert(self, inputs: Tensor, data_samples: list) -> Tensor:
        """The student's input in the teacher's normalisation and channel order."""
        if self.input_scale is None:
            return inputs
        if self.flip_channels:
            inputs = inputs.flip(1)
        inputs = inputs * self.input_scale + self.input_shift
        value = _pad_value(self.model.data_preprocessor)
        for image, sample in zip(inputs, data_samples, strict=True):
            left, right, top, bottom = _padding(image, sample.metainfo)
            height, width = image.shape[1:]
            image[:, :, width - right :] = value
            image[:, height - bottom :] = value
            image[:, :, :left] = value
            image[:, :top] = value
        return inputs


def _pad_value(preprocessor: nn.Module) -> float:
    """What it pads with, by mmseg's name for it or by mmengine's."""
    return getattr(preprocessor, 'pad_val', getattr(preprocessor, 'pad_value', 0))


def _padding(image: Tensor, meta: dict) -> tuple[int, int, int, int]:
    """Left, right, top, bottom, as mmseg notes it; mmdet pads to the right and at the bottom."""
    if 'padding_size' in meta or 'img_shape' not in meta:
        return meta.get('padding_size', (0, 0, 0, 0))
    height, width = meta['img_shape'][:2]
    return 0, image.shape[2] - width, 0, image.shape[1] - height


def _flips_channels(preprocessor: nn.Module) -> bool:
    """Whether it turns BGR into RGB; mmseg 1.2 has another name for it than its fork and mmdet."""
    public = getattr(preprocessor, 'channel_conversion', False)
    return bool(getattr(preprocessor, '_channel_conversion', public))


def _normalisation(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    if not preprocessor._enable_normalize:
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    return preprocessor.mean.detach().cpu(), preprocessor.std.detach().cpu()


def _classes(meta: dict) -> tuple[str, ...] | None:
    dataset_meta = {k.lower(): v for k, v in (meta.get('dataset_meta') or {}).items()}
    classes = dataset_meta.get('classes', meta.get('CLASSES'))
    return tuple(classes) if classes else None
