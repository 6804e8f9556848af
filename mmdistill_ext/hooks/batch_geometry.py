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
        height, width = size[:2]
        new_height, new_width = (inside or size)[:2]
        return (
            _nearest(height, before[0], new_height, batch[0]),
            _nearest(width, before[1], new_width, batch[1]),
        )


def _nearest(side: int, before: int, after: int, end: int) -> np.ndarray:
    """Places in a batch along one side of an image, whose ``img_shape`` was and is these.

    An ``img_shape`` that is not the image's says how the batch was scaled only.
    """
    places: np.ndarray = np.arange(side)
    if after != side:
        places = ((places + 0.5) * after / before).astype(np.int64)
    return places.clip(0, end - 1)
