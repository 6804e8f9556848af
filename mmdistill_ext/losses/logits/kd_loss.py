"""Plain knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence

from mmdistill_ext.functional import All
from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.losses.logits.by_head import choose_difference, choose_distance
from mmdistill_ext.losses.logits.pair_loss import PairLoss
from mmdistill_ext.registry import MODELS


@MODELS.register_module()
class KDLoss(PairLoss):
    """Distils on every valid unit (Hinton et al., https://arxiv.org/abs/1503.02531).

    Args:
        distance: ``'kl'``, ``'reverse_kl'``, ``'mse'`` or ``'bce'``; by default ``'kl'``, and
            ``'bce'`` for sigmoid heads.
        temperature: > 0; ``'kl'``, ``'reverse_kl'`` and ``'bce'`` are multiplied by its square.
        class_weight: Weight of each label class, >= 0.
        average: Over all ``'valid'`` units or, as detectors do, the number of ``'positive'`` ones.
        box: For detectors: ``dict(weight=..., distance='iou'|'l1'|'distribution')`` distils the
            boxes of positive units too, see :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`.
        standardize: ``'kl'`` and ``'reverse_kl'``: standardise the logits of each unit first (LSKD,
            https://arxiv.org/abs/2403.01427), for softmax heads; see
            :func:`~mmdistill_ext.functional.logits.standardize.standardize_logits`.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    def __init__(
        self,
        distance: str | None = None,
        temperature: float = 1.0,
        class_weight: Sequence[float] | None = None,
        average: str = 'valid',
        box: dict | None = None,
        standardize: bool = False,
    ) -> None:
        check_choice('average', average, ('valid', 'positive'))
        super().__init__(
            selection=All(),
            difference=choose_difference(),
            distance=choose_distance(distance, temperature, standardize),
            class_weight=class_weight,
            average=average,
            box=box,
        )
