"""Registered models that train a student with something besides its labels."""

from mmdistill_ext.distillers.fit_functions import ConstantFit, ExponentialFit, LogisticFit
from mmdistill_ext.distillers.teacher_student import build_teacher_student

__all__ = ['ConstantFit', 'ExponentialFit', 'LogisticFit', 'build_teacher_student']
