"""How several networks form their second prediction together (COL-3), one policy per file.

Method of CN111598182A (SenseTime); cf. KDCL, Guo et al., CVPR 2020: "Online Knowledge Distillation
via Collaborative Learning".
"""

from mmdistill_ext.policies.second_predictions.base import (
    LabelSpec,
    SecondPrediction,
    Validation,
    build_second_prediction,
)
from mmdistill_ext.policies.second_predictions.general import General
from mmdistill_ext.policies.second_predictions.linear import Linear
from mmdistill_ext.policies.second_predictions.min_logit import MinLogit
from mmdistill_ext.policies.second_predictions.min_loss import MinLoss
from mmdistill_ext.policies.second_predictions.validation_weighted import ValidationWeighted

__all__ = [
    'General',
    'LabelSpec',
    'Linear',
    'MinLogit',
    'MinLoss',
    'SecondPrediction',
    'Validation',
    'ValidationWeighted',
    'build_second_prediction',
]
