"""What single-stage heads predicted in one step, and the targets that one of them assigned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call
from mmdistill_ext.units.boxes import decode_safely
from mmdistill_ext.units.dense.family import Assigned, DenseFamily
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.painters import Levels


class DenseOutputs:
    """Predictions of one head in one step, each worked out when it is first asked for.

    Names with ``all_`` cover all levels of the head; the others only the levels that the compared
    heads have in common, with ``N`` units per image.

    Args:
        family: How the head is read.
        places: The common levels, as indices of the head's.
        read: Returns what the head's ``forward`` returned, or what its loss was given.
    """

    def __init__(
        self,
        family: DenseFamily,
        places: Sequence[int],
        read: Callable[[], Sequence[Sequence[Tensor]]],
    ) -> None:
        self.family, self.places, self._read = family, places, read

    @cached_property
    def all_outputs(self) -> Sequence[Sequence[Tensor]]:
        """Class logits, box predictions and perhaps more, each level by level."""
        with torch.enable_grad():  # it may be asked for first where no gradient is needed
            return self.family.outputs(self._read())

    @cached_property
    def all_levels(self) -> Levels:
        """Where the units of all levels lie."""
        # Not of `all_outputs`, whose graph has the same place in every step, split or not.
        return self.family.levels([(x.shape[-2], x.shape[-1]) for x in self._maps])

    @cached_property
    def levels(self) -> Levels:
        """Where the units lie."""
        return Levels(self.common(self.all_levels))

    def common(self, levels: Sequence) -> list:
        """Pick the common levels from a sequence over all levels."""
        return [levels[place] for place in self.places]

    @property
    def scores(self) -> tuple[Tensor, ...]:
        """Class logits of each level, ``(B, A, C, n)``."""
        channels = self.family.score_channels
        return tuple(
            level.unflatten(1, (-1, channels)).flatten(3)
            for level in self.common(self.all_outputs[0])
        )

    @cached_property
    def confidence(self) -> Tensor:
        """Scores in [0, 1], ``(B, N, C)``, or ``(B, N, C + 1)`` with background."""
        outputs = [self.common(output) for output in self.all_outputs]
        scores = self.family.flatten(outputs[0], self.family.score_channels)
        return self.family.confidence(outputs, full_precision(scores))

    @cached_property
    def strides(self) -> Tensor:
        """Stride of each unit in pixels, ``(N,)``."""
        like = self._like
        parts = zip(self.levels.sizes, self.levels, strict=True)
        return torch.cat([like.new_full((count,), level.stride) for count, level in parts])

    @cached_property
    def priors(self) -> Tensor:
        """Points or anchors, ``(N, 2 or 4)``."""
        sizes = [(level.height, level.width) for level in self.all_levels]
        return torch.cat(self.common(self.family.priors(sizes, self._like)))

    @cached_property
    def flat_boxes(self) -> Tensor:
        """Box predictions as the head encodes them, ``(B, N, box_channels)``."""
        return self.family.flatten(self.common(self.all_outputs[1]), self.family.box_channels)

    def encoded(self, images: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Priors, strides and box predictions ``(K, ...)`` of some units, to be decoded."""
        # In full precision under AMP too: in half precision boxes are off by pixels.
        predicted = full_precision(self.flat_boxes[images, units])
        return self.priors[units], self.strides[units], predicted

    def decode(self, images: Tensor, units: Tensor) -> Tensor:
        """Boxes of some units, ``(K, 4)``."""
        return self.decode_encoded(*self.encoded(images, units))

    def decode_encoded(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` of what :meth:`encoded` gave; none that overflows gets a gradient."""
        return decode_safely(lambda x: self.family.decode(priors, strides, x), predicted)

    @property
    def _like(self) -> Tensor:
        return self._maps[0].new_zeros((), dtype=torch.float32)

    @property
    def _maps(self) -> Sequence[Tensor]:
        return self._read()[self.family.scores_at]


class DenseTargets:
    """The target assignment that one of several heads made for its own loss in one step.

    Args:
        outputs: Name of a head, for errors -> its predictions.
        calls: Gives, by its name, the calls of a method of the head that assigned the targets.
        lead: Name of the head that assigned them; the first when not given.
    """

    def __init__(
        self,
        outputs: Mapping[str, DenseOutputs],
        calls: Callable[[str], list[Call]],
        lead: str | None = None,
    ) -> None:
        self.outputs, self._calls = outputs, calls
        self.lead = outputs[next(iter(outputs)) if lead is None else lead]

    @cached_property
    def all_assigned(self) -> Assigned:
        """The assignment for all levels of the head that made it."""
        family = self.lead.family
        first, *more = (self._calls(name) for name in family.taps)
        with torch.no_grad():
            return family.assigned(first, self.lead.all_levels, *more)

    @cached_property
    def assigned(self) -> Assigned:
        """The assignment for the common levels.

        Raises:
            ValueError: The heads' feature maps have different sizes there.
        """
        self._check_sizes()
        lead = self.lead
        if len(lead.levels) == len(lead.all_levels):
            return self.all_assigned
        sizes = lead.all_levels.sizes
        parts = (
            None if part is None else torch.cat(lead.common(part.split(sizes, 1)), 1)
            for part in self.all_assigned
        )
        return Assigned(*parts)  # type: ignore[arg-type]  # only the last may be None

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and unit of the positive units, two of ``(P,)``."""
        boxed = self.assigned.boxed
        if boxed is None:
            positive = self.assigned.labels < self.lead.family.num_classes
            boxed = self.assigned.classified & positive
        images, units = boxed.nonzero(as_tuple=True)
        return images, units

    @property
    def labels(self) -> Tensor:
        """Labels that the heads are compared by, ``(B, N)``; ignored where a class is untrained."""
        labels, classified = self.assigned.labels, self.assigned.classified
        others = [head for head in self.outputs.values() if head is not self.lead]
        if not all(other.family.knows_background for other in others):
            classified = classified & (labels < self.lead.family.num_classes)
        return labels.where(classified, IGNORED)

    @cached_property
    def boxes(self) -> Tensor:
        """Assigned boxes of the positive units, ``(P, 4)``."""
        places = self.index[1]
        targets = self.assigned.targets[self.index]
        lead = self.lead
        return lead.family.decode_targets(lead.priors[places], lead.strides[places], targets)

    def _check_sizes(self) -> None:
        sizes = {
            name: [level[:2] for level in outputs.levels] for name, outputs in self.outputs.items()
        }
        if len({str(size) for size in sizes.values()}) > 1:
            listed = ', '.join(f'{size} in {name}' for name, size in sizes.items())
            raise ValueError(
                'The heads should have feature maps of the same sizes, level by level. '
                f'Found {listed}.'
            )
