"""The families of mmdet's RoI heads, one file each."""

from mmdistill_ext.units.roi.families import cascade, grid, htc, pisa, scnet, standard, trident

__all__ = ['cascade', 'grid', 'htc', 'pisa', 'scnet', 'standard', 'trident']
