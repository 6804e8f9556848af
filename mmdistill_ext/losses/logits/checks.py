"""What the losses on units demand of a pair of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mmdistill_ext.functional import Difference, Distance
from mmdistill_ext.functional.checks import num_label_classes

if TYPE_CHECKING:
    from mmdistill_ext.losses.boxes.box_term import BoxTerm
    from mmdistill_ext.units.pair import HeadPair


def check_box(box: BoxTerm | None, pair: HeadPair) -> None:
    """Raise ``ValueError`` unless the heads have boxes that the term can compare."""
    if box is None or box.distance in pair.box_distances:
        return
    if not pair.box_distances:
        raise ValueError(f'`box` is for heads with boxes: leave it out. Found {box.distance!r}.')
    raise ValueError(
        f'`box.distance` should be one of {", ".join(pair.box_distances)} for these heads. '
        f'Found {box.distance!r}.'
    )


def check_average(average: str, pair: HeadPair) -> None:
    """Raise ``ValueError`` for an average over positive units where there are none."""
    if average == 'positive' and not pair.background:
        raise ValueError("`average='positive'` is for detectors. Found a head without boxes.")


def check_for_sigmoid(difference: Difference, distance: Distance) -> None:
    """Raise ``ValueError`` unless both have a meaning for a head of sigmoids."""
    softmax = [x.described for x in (difference, distance) if x.softmax_only]
    if softmax:
        raise ValueError(
            "`difference` and `distance` should be 'bce' (or 'mse') for a sigmoid head. "
            f'Found {", ".join(softmax)}.'
        )


def check_weights(class_weight: Tensor | None, pair: HeadPair) -> None:
    """Raise ``ValueError`` unless there is one weight per label class."""
    classes = pair.num_classes
    expected = classes + 1 if pair.background else num_label_classes(classes)
    if class_weight is not None and len(class_weight) != expected:
        raise ValueError(
            f'`class_weight` should hold {expected} weights, one per class. '
            f'Found {len(class_weight)}.'
        )
