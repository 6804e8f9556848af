"""RetinaNet (https://arxiv.org/abs/1708.02002)."""

from mmdet.models.dense_heads import RetinaHead

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(RetinaHead)
class Retina(DenseFamily):
    """Several anchors per location, box deltas; every loss module has a row for every unit."""

    all_rows = ('loss_cls', 'loss_bbox')
