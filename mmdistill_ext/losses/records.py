"""What a loss keeps from its last forward for hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdistill_ext.units.base import Contrast


class Records(nn.Module):
    """What one loss keeps for hooks, on the device, until they take it.

    It moves with the loss it is part of and is in no checkpoint.

    Attributes:
        keep_contrast: Set to True to have the next forward keep what :meth:`pop_contrast` gives.
        counts: ``(2, classes)`` int64, see :meth:`pop_counts`; None before the first forward.
    """

    counts: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.keep_contrast = False
        self._contrast: Contrast | None = None
        self._fit_sums: Tensor | None = None
        self.register_buffer('counts', None, persistent=False)

    def add_counts(self, counts: Tensor) -> None:
        """Add the counts ``(2, classes)`` of one forward."""
        self.counts = counts if self.counts is None else self.counts + counts

    def put_contrast(self, contrast: Contrast) -> None:
        """Keep who won the units of this forward, if asked to."""
        if self.keep_contrast:
            self._contrast = contrast

    def put_fit_sums(self, sums: Tensor) -> None:
        """Keep the sums ``(4,)`` of this forward, see :meth:`pop_fit_sums`."""
        self._fit_sums = sums

    def pop_counts(self) -> Tensor | None:
        """Counts since the last call, of this rank, and start again.

        Returns:
            ``(2, classes)`` int64: valid units, and units where the teacher wins, per label; None
            before the first forward.
        """
        counts = self.counts
        if counts is not None:
            self.counts = torch.zeros_like(counts)
        return counts

    def pop_contrast(self) -> Contrast | None:
        """Where the teacher won and which units are valid (SEL-4).

        Returns:
            That of the last forward with :attr:`keep_contrast`, once; None without.
        """
        contrast, self._contrast = self._contrast, None
        return contrast

    def pop_fit_sums(self) -> Tensor | None:
        """Sums of the last forward with a split and the head's own loss, over all ranks (FIT-2).

        Returns:
            ``(4,)``, once: the own loss before ``F(x)`` and its weights (the first GT loss is their
            quotient; weights are pixels, of detectors images), simple samples and valid samples.
            None without such a forward.
        """
        sums, self._fit_sums = self._fit_sums, None
        return sums
