"""Box heads of CondInst (https://arxiv.org/abs/2003.05664) and BoxInst (2012.02310)."""

from mmdet.models.dense_heads import CondInstBboxHead

from mmdistill_ext.units.dense.families.fcos import FCOS
from mmdistill_ext.units.dense.family import DENSE_FAMILIES


@DENSE_FAMILIES.register(CondInstBboxHead)
class CondInst(FCOS):
    """FCOS whose points also predict the filters of their masks; BoxInst's is the same."""
