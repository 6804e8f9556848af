"""The families of mmdet's single-stage heads, one file each."""

from mmdistill_ext.units.dense.families import atss, fcos, gfl, retina, rtmdet, yolox

__all__ = ['atss', 'fcos', 'gfl', 'retina', 'rtmdet', 'yolox']
