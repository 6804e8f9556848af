"""The loss of the selective teacher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmdistill_ext.functional import BlockwiseResult, TeacherBetter
from mmdistill_ext.losses.logits.by_head import choose_difference, choose_distance
from mmdistill_ext.losses.logits.pair_loss import PairLoss
from mmdistill_ext.registry import MODELS


@MODELS.register_module()
class SelectiveLoss(PairLoss):
    """Distils where the teacher beats the student (CN115310277A, Alibaba; SEL-2 to SEL-6).

    Per valid unit, the model whose difference from the label is smaller wins, a tie goes to the
    student; the student is drawn to the teacher on the units that the teacher wins.

    Args:
        distance: ``'kl'``, ``'reverse_kl'``, ``'mse'`` or ``'bce'``; by default ``'kl'``, and
            ``'bce'`` for sigmoid heads.
        difference: ``'ce'`` or ``'bce'``; by default ``'ce'``, and ``'bce'`` for sigmoid heads.
        temperature: > 0; ``'kl'``, ``'reverse_kl'`` and ``'bce'`` are multiplied by its square.
        class_weight: Weight of each label class, >= 0.
        average: Over the ``'selected'`` units or, so that the loss fades as the student catches
            up, over all ``'valid'`` ones; as detectors do, the number of ``'positive'`` ones.
        box: For detectors: ``dict(weight=..., distance='iou'|'l1'|'distribution')`` distils the
            boxes of positive units too, see
            :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`. Their difference is
            1 - IoU with the assigned box.
        together: Class and box of a unit are selected together, by the sum of both differences,
            instead of each on its own.
        standardize: ``'kl'`` and ``'reverse_kl'``: standardise the logits of each unit first (LSKD,
            https://arxiv.org/abs/2403.01427), for softmax heads; see
            :func:`~mmdistill_ext.functional.logits.standardize.standardize_logits`.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    def __init__(
        self,
        distance: str | None = None,
        difference: str | None = None,
        temperature: float = 1.0,
        class_weight: Sequence[float] | None = None,
        average: str = 'selected',
        box: dict | None = None,
        together: bool = False,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            selection=TeacherBetter(),
            difference=choose_difference(difference),
            distance=choose_distance(distance, temperature, standardize),
            class_weight=class_weight,
            average=average,
            box=box,
            together=together,
        )

    def _shares(self, result: BlockwiseResult) -> dict[str, Tensor]:
        valid, won = result.counts.sum(1).to(result.distill_weight)
        return dict(teacher_better=won / valid.clamp(min=1))
