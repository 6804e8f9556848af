"""What heads with one heatmap for each class have in common."""

from mmdistill_ext.units.dense.family import DenseFamily

STRIDE = 4
"""Pixels of the image per pixel of the heatmaps; about, where padding is uneven."""


class Heatmaps(DenseFamily):
    """Pixels of heatmaps, one for each class, at one level."""

    needs_assigner = False
    unsplit = 'this one compares each pixel with a heatmap of every class'

    @property
    def sigmoid(self) -> bool:
        """The classes are independent sigmoids."""
        return True

    @property
    def score_channels(self) -> int:
        """One score per class."""
        return self.num_classes

    @property
    def strides(self) -> list[int]:
        """Stride of the only level, in pixels."""
        return [STRIDE]
