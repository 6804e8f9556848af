"""The methods' mathematics: PyTorch only, no state."""

from .blockwise import Block, BlockwiseResult, Selection, blockwise_distillation
from .checks import check_labels
from .fit import (
    SPLITS,
    FitParts,
    exponential_fit,
    fit_loss,
    fit_parts,
    fitting_error,
    logistic_fit,
    simple_images,
    simple_units,
)
from .selective import (
    contrast_mask,
    select_units,
    selective_distillation,
    unit_difference,
    unit_distillation,
)

__all__ = [
    'SPLITS',
    'Block',
    'BlockwiseResult',
    'FitParts',
    'Selection',
    'blockwise_distillation',
    'check_labels',
    'contrast_mask',
    'exponential_fit',
    'fit_loss',
    'fit_parts',
    'fitting_error',
    'logistic_fit',
    'select_units',
    'selective_distillation',
    'simple_images',
    'simple_units',
    'unit_difference',
    'unit_distillation',
]
