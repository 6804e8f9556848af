"""Registered models that train a student with something besides its labels."""

from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.policies.fit_functions import ConstantFit, ExponentialFit, LogisticFit
from mmdistill_ext.policies.second_predictions import (
    General,
    Linear,
    MinLogit,
    MinLoss,
    ValidationWeighted,
)

__all__ = [
    'CollaborativeDistiller',
    'ConstantFit',
    'ExponentialFit',
    'General',
    'Linear',
    'LogisticFit',
    'MinLogit',
    'MinLoss',
    'ValidationWeighted',
    'build_teacher_student',
]
