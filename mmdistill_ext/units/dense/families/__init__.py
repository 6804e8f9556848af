"""The families of mmdet's single-stage heads, one file each."""

from mmdistill_ext.units.dense.families import (
    atss,
    centernet,
    condinst,
    fcos,
    gfl,
    retina,
    rtmdet,
    rtmdet_ins,
    solo,
    ssd,
    yolact,
    yolof,
    yolov3,
    yolox,
)

__all__ = [
    'atss',
    'centernet',
    'condinst',
    'fcos',
    'gfl',
    'retina',
    'rtmdet',
    'rtmdet_ins',
    'solo',
    'ssd',
    'yolact',
    'yolof',
    'yolov3',
    'yolox',
]
