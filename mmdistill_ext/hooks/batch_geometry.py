"""Where the images of a training step lie in the batch that the networks see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn


class BatchGeometry:
    """Notes the sizes that a data preprocessor gives to the images of the next batch.

    Preprocessors pad to the right and at the bottom, and their ``batch_augments`` may resize the
    whole batch (mmdet's ``BatchSyncRandomResize`` and ``BatchResize``); ``img_shape`` of a data
    sample then is the size of the image in the batch.

    Args:
        preprocessor: The model's, which runs once before :meth:`close`.
    """

    def __init__(self, preprocessor: nn.Module) -> None:
        self._sizes: list[Sequence[int] | None] = []
        self._handle = preprocessor.register_forward_hook(self._note)

    def _note(self, preprocessor: nn.Module, args: tuple, output: dict) -> None:
        samples = output.get('data_samples') or ()
        self._sizes = [sample.metainfo.get('img_shape') for sample in samples]

    def close(self) -> None:
        """Stop noting."""
        self._handle.remove()

    def pixels(
        self, place: int, size: Sequence[int], meta: Mapping, batch: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the batch that each row and column of an image is nearest to.

        Args:
            place: Place of the image in the batch.
            size: Height and width of the image as it left the pipeline.
            meta: Meta information that its data sample left the pipeline with.
            batch: Height and width of the batch.

        Returns:
            Rows ``(H,)`` and columns ``(W,)``.
        """
        inside = self._sizes[place] if place < len(self._sizes) else None
        before = meta.get('img_shape') or size
        rows, columns = (
            # an `img_shape` of before that is not of the image says how the batch was scaled only
            np.arange(side) if new in (None, side) else ((np.arange(side) + 0.5) * new / old)
            for side, old, new in zip(size, before[:2], (inside or (None, None))[:2], strict=True)
        )
        return tuple(
            axis.astype(np.int64).clip(0, end - 1)
            for axis, end in zip((rows, columns), batch, strict=True)
        )
