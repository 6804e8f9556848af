"""What pairs of masks that locations predict have in common."""

from __future__ import annotations

from torch import nn

from mmdistill_ext.units.dense.pair import DensePair
from mmdistill_ext.units.detector_pair import DetectorPair


class LocationMaskPair(DetectorPair):
    """Pairs masks that student and teacher predict for the same location, pixel by pixel.

    As in a binary segmenter a pixel is inside or outside.

    Attributes:
        dense: The pair of the heads that predict the class of the locations.
    """

    background = False
    box_distances = ()
    sigmoid = True
    predicts = False
    num_classes = 2
    label_kinds = 'boxes and masks'
    dense: DensePair

    def pair_classes(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        """Set :attr:`dense`, given the paths of the heads that predict classes.

        Raises:
            ValueError: They do not fit, or the teacher lacks a level of the student.
        """
        self.dense = DensePair(student, teacher, head, teacher_head, key)
        levels = [family.strides for family in (self.dense.student, self.dense.teacher)]
        if len(self.dense.student_levels) < len(levels[0]):
            raise ValueError(
                f'To compare masks the teacher should have all levels of the student (`{key}`). '
                f'Found {levels[0]} in the student, {levels[1]} in the teacher.'
            )
        self.teacher_training = self.dense.teacher_training

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set; the labels are only outside and inside."""
        return self.dense.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, whatever the data's classes are."""
        return ('outside', 'inside')

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the boxes and masks that the own loss needs."""
        instances = sample['data_samples'].get('gt_instances', {})
        return 'masks' in instances and super().has_labels(sample)

    def fused_loss(self, key: str) -> None:
        """None: the head forms its own loss.

        Raises:
            ValueError: On ``fuse_task_loss``, and on ``fit``.
        """
        if key == 'fit':
            raise ValueError(
                f'`{key}` cannot split the own loss of the masks of {type(self.head).__name__}: it '
                'compares a mask in one piece. Leave out this loss of masks, or `fit`.'
            )
        super().fused_loss(key)
