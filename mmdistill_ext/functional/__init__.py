"""The methods' mathematics: PyTorch only, no state."""

from mmdistill_ext.functional.blocks.reader import BlockReader
from mmdistill_ext.functional.blocks.values import CrossEntropy, Labels, Side, Split
from mmdistill_ext.functional.blockwise import BlockwiseResult, blockwise_distillation
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
from mmdistill_ext.functional.logits.differences import DIFFERENCES, Difference, unit_difference
from mmdistill_ext.functional.logits.distances import (
    BCE,
    DISTANCES,
    KL,
    MSE,
    Distance,
    ReverseKL,
    make_distance,
    unit_distillation,
)
from mmdistill_ext.functional.logits.selective import (
    contrast_mask,
    select_units,
    selective_distillation,
)
from mmdistill_ext.functional.logits.standardize import standardize_logits
from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.functional.selections import SELECTIONS, All, Block, Selection, TeacherBetter
from mmdistill_ext.functional.simplex import GRANULARITIES, SimplexWeights, simplex_weights

__all__ = [
    'BCE',
    'DIFFERENCES',
    'DISTANCES',
    'GRANULARITIES',
    'KL',
    'MSE',
    'SELECTIONS',
    'SPLITS',
    'All',
    'Block',
    'BlockReader',
    'BlockwiseResult',
    'CollaborationResult',
    'CrossEntropy',
    'Difference',
    'Distance',
    'FitParts',
    'Labels',
    'ReverseKL',
    'Selection',
    'Side',
    'SimplexWeights',
    'Split',
    'TeacherBetter',
    'blockwise_distillation',
    'check_labels',
    'collaborate',
    'contrast_mask',
    'error_correlation',
    'exponential_fit',
    'fit_loss',
    'fit_parts',
    'fitting_error',
    'full_precision',
    'general_weights',
    'linear',
    'logistic_fit',
    'make_distance',
    'min_logit',
    'min_loss',
    'mix',
    'networks_correlation',
    'select_units',
    'selective_distillation',
    'simple_images',
    'simple_units',
    'simplex_weights',
    'standardize_logits',
    'unit_difference',
    'unit_distillation',
    'validation_weights',
    'weigh_rows',
]
