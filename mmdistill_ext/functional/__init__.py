"""The methods' mathematics: PyTorch only, no state."""

from .blockwise import Block, BlockwiseResult, Selection, blockwise_distillation
from .checks import check_labels
from .collaboration import CollaborationResult, collaborate, networks_correlation
from .ensemble import (
    error_correlation,
    general_weights,
    linear,
    min_logit,
    min_loss,
    mix,
    validation_weights,
)
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
from .networks import Networks
from .selective import (
    contrast_mask,
    select_units,
    selective_distillation,
    unit_difference,
    unit_distillation,
)
from .simplex import GRANULARITIES, SimplexWeights, simplex_weights

__all__ = [
    'GRANULARITIES',
    'SPLITS',
    'Block',
    'BlockwiseResult',
    'CollaborationResult',
    'FitParts',
    'Networks',
    'Selection',
    'SimplexWeights',
    'blockwise_distillation',
    'check_labels',
    'collaborate',
    'contrast_mask',
    'error_correlation',
    'exponential_fit',
    'fit_loss',
    'fit_parts',
    'fitting_error',
    'general_weights',
    'linear',
    'logistic_fit',
    'min_logit',
    'min_loss',
    'mix',
    'networks_correlation',
    'select_units',
    'selective_distillation',
    'simple_images',
    'simple_units',
    'simplex_weights',
    'unit_difference',
    'unit_distillation',
    'validation_weights',
]
