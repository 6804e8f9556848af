"""RetinaNet (https://arxiv.org/abs/1708.02002) and heads with its targets and loss."""

from mmdet.models.dense_heads import PISARetinaHead, RetinaHead, RetinaSepBNHead

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(RetinaHead)
class Retina(DenseFamily):
    """Several anchors per location, box deltas; every loss module has a row for every unit."""

    all_rows = ('loss_cls', 'loss_bbox')


@DENSE_FAMILIES.register(RetinaSepBNHead)
class RetinaSepBN(Retina):
    """RetinaNet with batch norms of each level (EfficientNet, NAS-FPN): no subclass of its head."""


@DENSE_FAMILIES.register(PISARetinaHead)
class PISARetina(Retina):
    """RetinaNet with PISA (https://arxiv.org/abs/1904.04821), which reweighs positive anchors."""

    unsplit = 'it weighs the losses of its anchors by the losses of others'
