"""The families of heads that predict a mask for each location, one file each."""

from mmdistill_ext.units.instance.families import condinst, rtmdet_ins, yolact

__all__ = ['condinst', 'rtmdet_ins', 'yolact']
