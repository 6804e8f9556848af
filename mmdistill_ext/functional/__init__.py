"""The methods' mathematics: PyTorch only, no state."""

from .blockwise import Block, BlockwiseResult, Selection, blockwise_distillation
from .checks import check_labels
from .selective import (
    contrast_mask,
    select_units,
    selective_distillation,
    unit_difference,
    unit_distillation,
)

__all__ = [
    'Block',
    'BlockwiseResult',
    'Selection',
    'blockwise_distillation',
    'check_labels',
    'contrast_mask',
    'select_units',
    'selective_distillation',
    'unit_difference',
    'unit_distillation',
]
