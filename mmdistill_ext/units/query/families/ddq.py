"""DDQ-DETR (https://arxiv.org/abs/2303.12776)."""

from collections.abc import Sequence

from mmdet.models.dense_heads.ddq_detr_head import DDQDETRHead
from torch import Tensor

from mmdistill_ext.units.query.families.detr import DETR
from mmdistill_ext.units.query.family import QUERY_FAMILIES


@QUERY_FAMILIES.register(DDQDETRHead)
class DDQ(DETR):
    """DINO with distinct queries: duplicates are taken out before every layer, and not compared.

    The losses of its dense queries, which have several objects' worth of matches, are not split.
    """

    loss_methods = (*DETR.loss_methods, '_loss_for_distinct_queries_single')
    layer_methods = (*DETR.layer_methods, '_loss_for_distinct_queries_single')
    other_losses = (*DETR.other_losses, 'aux_')

    def last_layer(
        self, outputs: Sequence[Tensor], images: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Scores and boxes of the distinct queries of each image, as the head predicts with."""
        kept = self.head.cache_dict
        masks = [kept['distinct_query_mask'][-1][i * kept['num_heads']][0] for i in range(images)]
        scores, boxes = super().last_layer(outputs, images)
        return (
            [values[mask] for values, mask in zip(scores, masks, strict=True)],
            [values[mask] for values, mask in zip(boxes, masks, strict=True)],
        )
