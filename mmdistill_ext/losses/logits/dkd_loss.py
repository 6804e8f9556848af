"""Decoupled knowledge distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmdistill_ext.functional import All
from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.functional.logits.dkd import DKD
from mmdistill_ext.losses.logits.by_head import ByHead, choose_difference
from mmdistill_ext.losses.logits.pair_loss import PairLoss
from mmdistill_ext.registry import MODELS

if TYPE_CHECKING:
    from mmdistill_ext.units.pair import HeadPair


@MODELS.register_module()
class DKDLoss(PairLoss):
    """Distils label and other classes apart, on every valid unit (DKD, Zhao et al., CVPR 2022).

    https://arxiv.org/abs/2203.08679, eq. 7: ``T^2 (alpha TCKD + beta NCKD)``, see
    :func:`~mmdistill_ext.functional.logits.dkd.decouple`. Plain distillation weighs what the
    teacher knows of the other classes by ``1 - p_t``, so little where the teacher is sure; here the
    weight is ``beta``, which makes the loss many times as large where teachers are sure. The
    defaults are the paper's for CIFAR-100; for ImageNet it has ``beta=0.5`` and ``temperature=1``.

    Args:
        alpha: >= 0, weight of the label's class against all others.
        beta: >= 0, weight of the other classes among themselves.
        temperature: > 0; the loss is multiplied by its square.
        standardize: Standardise the logits of each unit first (LSKD,
            https://arxiv.org/abs/2403.01427); see
            :func:`~mmdistill_ext.functional.logits.standardize.standardize_logits`.
        class_weight: Weight of each label class, >= 0.
        average: Over all ``'valid'`` units or, as detectors do, the number of ``'positive'`` ones.
        box: For detectors with a softmax: ``dict(weight=..., distance='iou'|'l1'|'distribution')``
            distils the boxes of positive units too, see
            :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
        class_weight: Sequence[float] | None = None,
        average: str = 'valid',
        box: dict | None = None,
    ) -> None:
        check_choice('average', average, ('valid', 'positive'))
        distance = DKD(temperature, standardize, alpha, beta)
        super().__init__(
            selection=All(),
            difference=choose_difference(),
            distance=ByHead(distance, distance),
            class_weight=class_weight,
            average=average,
            box=box,
        )

    def check(self, pair: HeadPair) -> None:
        """Refuse heads that the loss does not fit; asked once, before the first step.

        Args:
            pair: The two heads.

        Raises:
            ValueError: As the base class says, and for sigmoid heads.
        """
        if pair.sigmoid:
            raise ValueError(
                '`DKDLoss` is for softmax heads: independent sigmoids have no distribution over '
                "the other classes. Use type='KDLoss', which distils each class on its own there. "
                'Found a sigmoid head.'
            )
        super().check(pair)
