"""Small registered classes, each one choice that a method leaves open."""

from mmdistill_ext.policies import second_predictions
from mmdistill_ext.policies.fit_functions import ConstantFit, ExponentialFit, LogisticFit

__all__ = ['ConstantFit', 'ExponentialFit', 'LogisticFit', 'second_predictions']
