"""Second prediction of the smallest logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdistill_ext.functional import min_logit
from mmdistill_ext.policies.second_predictions.base import LabelSpec, SecondPrediction
from mmdistill_ext.registry import SECOND_PREDICTIONS


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class MinLogit(SecondPrediction):
    """The smallest logit of each class (COL-3; KDCL-MinLogit, CVPR 2020; CN111598182A).

    ``z_c = min_n (z_n,c - z_n,y)``, where ``y`` is the label; without ``shift``
    ``z_c = min_n z_n,c``.

    Args:
        shift: Subtract the label's logit in each network first, so that the label's is 0 and no
            other can be the smallest by a network's offset (KDCL); for softmax heads.
    """

    shift: bool = True

    def bind(self, label_spec: LabelSpec) -> SecondPrediction:
        """A copy for heads with such labels; a shift would change the predictions of sigmoids.

        Raises:
            ValueError: The heads are of sigmoids, and the policy shifts.
        """
        if label_spec.sigmoid and self.shift:
            raise ValueError(
                '`second.shift` should be False for sigmoid heads, as those of most detectors '
                'are: to subtract the logit of the label changes them. Found True.'
            )
        return super().bind(label_spec)

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """The minimum over the networks, ``(1, C, n)``."""
        target = labels if self.shift else None
        return min_logit(logits, target, ignore_index=self.label_spec.ignore_index)
