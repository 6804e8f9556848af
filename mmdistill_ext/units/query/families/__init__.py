"""The families of mmdet's heads that predict by queries, one file each."""

from mmdistill_ext.units.query.families import ddq, detr, sparse

__all__ = ['ddq', 'detr', 'sparse']
