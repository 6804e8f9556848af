"""ATSS (https://arxiv.org/abs/1912.02424)."""

from mmdet.models.dense_heads import ATSSHead

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(ATSSHead)
class ATSS(DenseFamily):
    """One anchor per location, box deltas; ``get_targets`` gives the anchors before the labels."""

    labels_at = 1
