"""Two taps whose features are compared: matched at the start, brought together in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdistill_ext.connectors.build import build_connector
from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.tap_paths import Tap
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.features import Features
from mmdistill_ext.units.features.location_weights import LocationWeights
from mmdistill_ext.units.features.probe import Probe

GRIDS = ('student', 'teacher')
Patches = Callable[[Sequence[int]], tuple[int, int] | None]


class Shape(NamedTuple):
    """Channels of features, and the stride of their grid along both axes."""

    channels: int
    stride: tuple[float, float]

    def __str__(self) -> str:
        vertical, horizontal = (f'{stride:.4g}' for stride in self.stride)
        return f'{self.channels} channels at stride {vertical}x{horizontal}'


class FeaturePair:
    """Joins what is tapped in the student with what is tapped in the teacher.

    A tap gives one tensor, or several: a tuple of levels, or one of each call. Then the levels are
    compared one by one.

    Args:
        tap: The student's tap.
        teacher_tap: The teacher's tap.
        connector: Config of what brings the student's features to the teacher's channels, or a list
            of such; every level gets its own. None: there is none.
        grid: Compare on the grid of the ``'student'`` or of the ``'teacher'``, where they differ.
        weights: How much locations count.
        patches: Gives rows and columns of the patches that the teacher sees of a batch of some
            size; None where it sees no patches.
        any_channels: The loss compares different numbers of channels.
        key: The config key to name in errors.

    Attributes:
        connectors: Connector of each level, to become part of the student; None if there are none.
        teacher_calls: Path in the teacher -> number of its calls in a forward.

    Raises:
        ValueError: A value is impossible.
    """

    def __init__(
        self,
        tap: Tap,
        teacher_tap: Tap,
        connector: dict | list[dict] | None,
        grid: str,
        weights: LocationWeights,
        patches: Patches,
        any_channels: bool,
        key: str,
    ) -> None:
        check_choice(f'{key}.grid', grid, GRIDS)
        self.tap, self.teacher_tap, self.grid, self.weights = tap, teacher_tap, grid, weights
        self.connector_cfg, self.any_channels, self.key = connector, any_channels, key
        self.connectors: nn.ModuleList | None = None
        self.patches = patches
        self.teacher_calls: dict[str, int | None] = {teacher_tap.call: None}

    def match(self, student: Probe, teacher: Probe) -> None:
        """Size the connectors by one dry forward of either model, and log what is compared.

        Args:
            student: Dry forward of the student.
            teacher: Dry forward of the teacher.

        Raises:
            ValueError: A tap was not reached, gives no features, or they do not fit each other.
        """
        mine = self._levels(student, self.tap, None, f'{self.key}.tap')
        patches = self.patches(teacher.size)
        theirs = self._levels(teacher, self.teacher_tap, patches, f'{self.key}.teacher_tap')
        if len(mine) != len(theirs):
            raise ValueError(
                f'`{self.key}`: tap and teacher_tap should give as many levels. Found {len(mine)} '
                f"at '{self.tap}', {len(theirs)} at the teacher's '{self.teacher_tap}': choose one "
                f"of each, such as '{self.tap}.0'."
            )
        calls = len(teacher.calls[self.teacher_tap.call])
        self.teacher_calls = {**self.weights.teacher_calls, self.teacher_tap.call: calls}
        connectors = [
            self._connect(level, *pair) for level, pair in enumerate(zip(mine, theirs, strict=True))
        ]
        if self.connector_cfg is not None:
            self.connectors = nn.ModuleList(x for x in connectors if x is not None)

    @staticmethod
    def _levels(probe: Probe, tap: Tap, patches: tuple[int, int] | None, key: str) -> list[Shape]:
        shapes = []
        for value in _read_at_start(tap, probe.of(tap, key), patches, key):
            if value.ndim != 4 or len(value) != 1:
                raise ValueError(
                    f'`{key}` should lead to features of each image, (B, C, H, W). Found '
                    f"{tuple(value.shape)} at '{tap}' for one image."
                )
            height, width = (a / b for a, b in zip(probe.size, value.shape[2:], strict=True))
            shapes.append(Shape(value.shape[1], (height, width)))
        return shapes

    def _connect(self, level: int, mine: Shape, theirs: Shape) -> nn.Module | None:
        connector = None
        if self.connector_cfg is not None:
            connector = build_connector(
                self.connector_cfg, mine.channels, theirs.channels, f'{self.key}.connector'
            )
        elif mine.channels != theirs.channels and not self.any_channels:
            raise ValueError(
                f'`{self.key}` should compare as many channels, or have a connector such as '
                f"dict(type='Conv1x1'). Found {mine.channels} at '{self.tap}', {theirs.channels} "
                f"at the teacher's '{self.teacher_tap}'."
            )
        names = ' + '.join(type(part).__name__ for part in connector or ())
        print_log(
            f"{self.key}: student '{self.tap}' [{level}] ({mine})"
            f'{" through " + names if names else ""} is matched to teacher '
            f"'{self.teacher_tap}' [{level}] ({theirs}), on the {self.grid}'s grid.",
            logger='current',
        )
        return connector

    def __call__(
        self,
        taps: Taps,
        teacher: Mapping[str, Sequence[Call]],
        data_samples: list,
        size: tuple[int, int],
        connectors: nn.ModuleList | None,
    ) -> list[Features]:
        """Bring the features of one step together.

        Args:
            taps: Calls of the student.
            teacher: Path -> calls of the teacher.
            data_samples: The batch's data samples.
            size: Height and width of the batch.
            connectors: Connectors of the student that is trained; None if there are none.

        Returns:
            Features of each level.
        """
        mine = read(self.tap, taps.all(self.tap.call), None)
        with torch.no_grad():
            theirs = read(self.teacher_tap, teacher[self.teacher_tap.call], self.patches(size))
        levels = []
        for level, (own, other) in enumerate(zip(mine, theirs, strict=True)):
            self._check_rows(own, other)
            if connectors is not None:
                own = connectors[level](own)
            if self.grid == 'student':
                other = resize(other, own.shape[2:])
            else:
                own = resize(own, other.shape[2:])
            weight = self.weights(own, data_samples, size, teacher)
            levels.append(Features(own, other, weight))
        return levels

    def _check_rows(self, own: Tensor, other: Tensor) -> None:
        """Refuse rows of tokens or queries of different lengths, which have no grid to meet on."""
        is_row = own.shape[3] == 1 or other.shape[3] == 1
        if is_row and own.shape[2:] != other.shape[2:]:
            raise ValueError(
                f'`{self.key}` should have maps, or as many tokens in both models '
                '(`teacher.patch_size` makes a map of the patches of a vision transformer). Found '
                f"{tuple(own.shape[2:])} at '{self.tap}', {tuple(other.shape[2:])} at the "
                f"teacher's '{self.teacher_tap}'."
            )


def _read_at_start(
    tap: Tap, calls: list[Call], patches: tuple[int, int] | None, key: str
) -> list[Tensor]:
    """As :func:`read`; errors name the config key."""
    try:
        return read(tap, calls, patches)
    except ValueError as error:
        raise ValueError(f'`{key}`: {error}') from None


def read(tap: Tap, calls: Sequence[Call], patches: tuple[int, int] | None) -> list[Tensor]:
    """The tensors that a tap gives, as maps ``(B, C, H, W)``.

    Tokens ``(B, N, C)`` become a map of ``patches``, without what stands before them (class tokens,
    registers); without a grid, and vectors ``(B, C)``, a map that is one wide.

    Args:
        tap: The tap.
        calls: Its calls.
        patches: Rows and columns of the patches; None when there are none.

    Raises:
        ValueError: The tap gives something other than tensors.
    """
    values = [tap.read(call) for call in calls]
    values = values[0] if len(values) == 1 else values
    values = [values] if isinstance(values, Tensor) else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(x, Tensor) for x in values):
        raise ValueError(
            f"Tap '{tap}' should lead to a tensor, or a list of such. Found a "
            f'{type(values).__name__}: add an index or a name.'
        )
    return [_as_map(value, patches) for value in values]


def _as_map(value: Tensor, patches: tuple[int, int] | None) -> Tensor:
    if value.ndim == 2:
        return value[..., None, None]
    if value.ndim != 3:
        return value
    tokens = value.transpose(1, 2)
    if patches is None or tokens.shape[2] < patches[0] * patches[1]:
        return tokens.unsqueeze(-1)
    return tokens[..., -patches[0] * patches[1] :].unflatten(2, patches)


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """Bring ``(B, C, H, W)`` to another grid: averaged where it is coarser, else interpolated."""
    height, width = features.shape[2:]
    rows, columns = size
    if (height, width) == (rows, columns):
        return features
    if rows <= height and columns <= width:
        return F.adaptive_avg_pool2d(features, (rows, columns))
    return F.interpolate(features, (rows, columns), mode='bilinear', align_corners=False)
