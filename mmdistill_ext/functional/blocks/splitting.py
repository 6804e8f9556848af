"""Which units of a pass are simple and which are hard (FIT-3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.reader import BlockReader, Place
from mmdistill_ext.functional.blocks.values import Labels, Split
from mmdistill_ext.functional.blocks.weighted_sum import WeightedSum
from mmdistill_ext.functional.checks import (
    check_choice,
    check_factor,
    check_images,
    check_threshold,
    check_units,
)
from mmdistill_ext.functional.fit import SPLITS, is_simple, simple_units


class PassSplit:
    """The split of one pass: a mask per block, and the counts of simple samples.

    Whether a unit is hard is known in its own block. Of an image it is known after its last block:
    its sums are moved and its gradient is scaled then.

    Args:
        split: The rule.
        reader: What is read.

    Attributes:
        simple_counts: ``(rows, 2)`` int64, simple and all valid units; after :meth:`finish`
            samples, which are units or images.

    Raises:
        ValueError: A value is impossible, or the logits do not say what is simple.
    """

    def __init__(self, split: Split, reader: BlockReader) -> None:
        check_choice('split', split.by, SPLITS)
        check_threshold(split.threshold)
        check_factor('hard_weight', split.hard_weight)
        check_units('simple', split.simple, reader.shape)
        if split.simple is None and (reader.background or reader.of_levels):
            raise ValueError(
                '`split` of a detector needs `simple`: the logits do not say whether a box is '
                'right. Found None.'
            )
        self.by_image = split.by == 'image' and split.simple is None
        if self.by_image:
            check_images(reader.shape)
        self.threshold, self.hard_weight = split.threshold, split.hard_weight
        self.simple = None if split.simple is None else reader.to_blocks(split.simple)
        self.simple_counts = reader.target.new_zeros((len(reader.target), 2), dtype=torch.int64)

    def mask(self, place: Place, teacher: Tensor, labels: Labels) -> Tensor | None:
        """Count the simple units of a block.

        Args:
            place: Of the block.
            teacher: Logits of the teacher, ``(1, C, n)``.
            labels: ``(1, n)``.

        Returns:
            ``(1, n)`` bool, the simple units; None where images are split.
        """
        if self.simple is not None:
            simple = self.simple[place.slices] & labels.valid
        else:
            simple = simple_units(teacher, labels.target, labels.ignore_index)
        self.simple_counts[place.row, 0] += simple.sum()
        self.simple_counts[place.row, 1] += labels.valid.sum()
        return None if self.by_image else simple

    def finish(self, sums: Iterable[WeightedSum]) -> None:
        """Where images are split, say which are hard, in the counts and in the sums."""
        if not self.by_image:
            return
        simple, valid = self.simple_counts.unbind(1)
        hard = ~is_simple(simple, valid, self.threshold)
        for weighted in sums:
            weighted.harden(hard)
        self.simple_counts = torch.stack((~hard & (valid > 0), valid > 0), dim=1).long()
