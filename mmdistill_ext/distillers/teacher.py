"""A frozen teacher: always in eval mode, never part of the student."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from mmdistill_ext.checkpoint import load_exactly, load_weights
from mmdistill_ext.checkpoint_content import check_values, classes_of
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.tapped_forward import tapped_forward
from mmdistill_ext.distillers.teacher_input import TeacherInput
from mmdistill_ext.isolation import isolated_rng, training_flags
from mmdistill_ext.tap_paths import Tap
from mmdistill_ext.taps import Call


class Teacher(nn.Module):
    """Holds a trained model and gives its outputs without gradient.

    Building it draws no random number from the training's generators. It must not be registered as
    a child of the student (see :class:`~mmdistill_ext.distillers.teacher_student.DistilledModel`),
    so that it is in no checkpoint, optimizer, EMA copy or DDP bucket.

    Args:
        model: A model dict, a config path, or ``'mmseg::...'``. For losses of features it may be
            any module that takes a batch of images, such as a bare backbone, of any registry, or
            what a function returns (``type`` is its dotted name, or itself in a config written in
            Python).
        checkpoint: File or URL of its weights, loaded without running code.
        pretrained: The model comes with its trained weights; then there is no ``checkpoint``.
        prefix: Load only the weights whose names begin with this, e.g. ``'backbone.'``, which is
            removed from the names.
        data_preprocessor: Normalisation of a model that has no preprocessor of its own:
            ``dict(mean=..., std=..., bgr_to_rgb=...)``, as mmengine's ``ImgDataPreprocessor``.
        patch_size: Sides of its input should be multiples of this, as vision transformers want it:
            the input is resized to the nearest, and tokens ``(B, N, C)`` are taken for a grid of
            patches.
        compile: Run its backbone and neck through ``torch.compile``.
        channels_last: Run it in channels-last memory format (faster convolutions on GPUs).
        load_now: Read the weights here and not in :meth:`load`; no key of a config.

    Attributes:
        as_in_training: Paths of modules that compute as in training, without their layers, for the
            heads that need it (:attr:`HeadPair.teacher_training`).

    Raises:
        FileNotFoundError: The checkpoint or the config does not exist.
        ValueError: The checkpoint is broken, unsafe, or of another model.
    """

    def __init__(
        self,
        model: dict | str,
        checkpoint: str | os.PathLike | None = None,
        pretrained: bool = False,
        prefix: str = '',
        data_preprocessor: dict | None = None,
        patch_size: int | None = None,
        compile: bool = False,
        channels_last: bool = False,
        load_now: bool = True,
    ) -> None:
        super().__init__()
        if pretrained and checkpoint is not None:
            raise ValueError(
                '`teacher.pretrained=True` is for a model that comes with its weights. Found '
                f"`teacher.checkpoint`='{checkpoint}' beside it."
            )
        with isolated_rng():
            self.model = revert_sync_batchnorm(build_model(model, 'teacher.model'))
        self.checkpoint, self.pretrained, self.prefix = checkpoint, pretrained, prefix
        self.is_loaded = False
        self.classes: tuple[str, ...] | None = None
        if load_now:
            self.load()
        self.requires_grad_(False)
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.compiled = _compile(self.model) if compile else ()
        self.as_in_training: tuple[str, ...] = ()
        self.input = TeacherInput(self.model, data_preprocessor, patch_size)
        self.train(False)

    def load(self) -> None:
        """Read the weights; a second time does nothing.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            ValueError: There is none, or it is broken, unsafe, or of another model, or has weights
                that no training survives.
        """
        if self.is_loaded:
            return
        what = 'The model of `teacher.pretrained=True`'
        if not self.pretrained:
            what = f"`teacher.checkpoint`='{self.checkpoint}'"
            self._fill(what)
        check_values(self.model.state_dict(), what)
        self.is_loaded = True

    def _fill(self, what: str) -> None:
        if not isinstance(self.checkpoint, (str, os.PathLike)):
            raise ValueError(
                '`teacher.checkpoint` should be the file or URL of trained weights: an untrained '
                f'teacher teaches nothing. Found {self.checkpoint!r}.'
            )
        loaded = load_weights(self.checkpoint, 'teacher.checkpoint')
        state, prefix = loaded['state_dict'], self.prefix
        if prefix:
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if not state:
                raise ValueError(
                    '`teacher.prefix` should be what names of weights in `teacher.checkpoint` '
                    f"begin with. Found '{prefix}', names are such as "
                    f"'{next(iter(loaded['state_dict']))}'."
                )
        load_exactly(self.model, state, what)
        self.classes = classes_of(loaded['meta'])

    def check_tap(self, tap: Tap, key: str) -> None:
        """Refuse a tap inside of what is compiled: it would be recompiled in every step.

        Raises:
            ValueError: The tap is inside of a compiled part; the message names the key.
        """
        inside = [name for name in self.compiled if tap.call.startswith(f'{name}.' if name else '')]
        if inside and tap.call not in (*self.compiled, 'forward'):
            raise ValueError(
                f"`{key}` should be no part of what `teacher.compile=True` compiles. Found '{tap}' "
                f"in '{inside[0] or type(self.model).__name__}': tap its output or input."
            )

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, inputs: Tensor, data_samples: list, heads: list[str]) -> dict[str, Call]:
        """Run as far as the given heads and record their (last) calls.

        Args:
            inputs: Batch ``(B, 3, H, W)`` in the student's normalisation, padded.
            data_samples: The batch's data samples (their sizes are read, never their labels).
            heads: Dotted paths in the teacher.

        Returns:
            Path -> recorded call.
        """
        calls = self.calls(inputs, data_samples, dict.fromkeys(heads, 1))
        return {path: recorded[-1] for path, recorded in calls.items()}

    def calls(
        self,
        inputs: Tensor,
        data_samples: list | None,
        wanted: Mapping[str, int | None],
        to_the_end: bool = True,
    ) -> dict[str, list[Call]]:
        """Run as far as the wanted calls and record them.

        Args:
            inputs: Batch ``(B, 3, H, W)`` in the student's normalisation, padded.
            data_samples: The batch's data samples (their sizes are read, never their labels).
            wanted: See :func:`~mmdistill_ext.distillers.tapped_forward.tapped_forward`.
            to_the_end: See there too.

        Returns:
            Path -> its calls.
        """
        inputs = self.input(inputs, data_samples)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with training_flags(self.model.get_submodule(path) for path in self.as_in_training):
            return tapped_forward(self.model, inputs, data_samples, wanted, to_the_end)


def _compile(model: nn.Module) -> tuple[str, ...]:
    """Compile backbone and neck, or a model without them as a whole; return their names."""
    names = [name for name in ('backbone', 'neck') if getattr(model, name, None) is not None]
    for part in [getattr(model, name) for name in names] or [model]:
        part.compile()
    return tuple(names) or ('',)
