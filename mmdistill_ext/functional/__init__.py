"""The methods' mathematics: PyTorch only, no state."""

from mmdistill_ext.functional.blocks.reader import Networks
from mmdistill_ext.functional.blockwise import (
    Block,
    BlockwiseResult,
    Selection,
    blockwise_distillation,
)
from mmdistill_ext.functional.checks import check_labels
from mmdistill_ext.functional.collaboration import (
    CollaborationResult,
    collaborate,
    networks_correlation,
)
from mmdistill_ext.functional.ensemble import (
    error_correlation,
    general_weights,
    linear,
    min_logit,
    min_loss,
    mix,
    validation_weights,
)
from mmdistill_ext.functional.fit import (
    SPLITS,
    FitParts,
    exponential_fit,
    fit_loss,
    fit_parts,
    fitting_error,
    logistic_fit,
    simple_images,
    simple_units,
    weigh_rows,
)
from mmdistill_ext.functional.logits.selective import (
    contrast_mask,
    select_units,
    selective_distillation,
    unit_difference,
    unit_distillation,
)
from mmdistill_ext.functional.simplex import GRANULARITIES, SimplexWeights, simplex_weights

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
    'weigh_rows',
]
