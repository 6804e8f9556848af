"""DETR (https://arxiv.org/abs/2005.12872) and the heads with its matching and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from mmdet.models.dense_heads import DeformableDETRHead, DETRHead, DINOHead
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, Taps, wrapped
from mmdistill_ext.units.query.family import (
    QUERY_FAMILIES,
    Queries,
    QueryFamily,
    SimpleRows,
    image_sizes,
    padded,
)
from mmdistill_ext.units.split.own_loss import OwnLoss


@QUERY_FAMILIES.register(DETRHead)
@QUERY_FAMILIES.register(DeformableDETRHead)
@QUERY_FAMILIES.register(DINOHead)
class DETR(QueryFamily):
    """DETR, Conditional, DAB and Deformable DETR, DINO: queries of the last decoder layer.

    The losses of all decoder layers, and of the encoder's proposals, are split; those of DINO's
    denoising queries are not.
    """

    loss_methods: ClassVar[tuple[str, ...]] = (
        'loss_by_feat',
        'loss_by_feat_single',
        'get_targets',
        '_get_targets_single',
    )
    layer_methods: ClassVar[tuple[str, ...]] = ('loss_by_feat_single',)
    """Methods of the head that form the losses of one layer, after matching its queries."""
    other_losses: ClassVar[tuple[str, ...]] = ('dn_loss',)
    """Parts of the names of losses on other than matched queries."""

    def __init__(self, model: nn.Module, path: str, head: nn.Module) -> None:
        super().__init__(model, path, head)
        self.loss_tap = f'{path}.loss_by_feat'  # of all decoder layers
        self.targets_tap = f'{path}.get_targets'  # of one layer
        self.match_tap = f'{path}.assigner.assign'  # of one layer and image
        self.taps = self.loss_tap, self.targets_tap, self.match_tap
        self.teacher_tap = path

    @property
    def has_assigner(self) -> bool:
        """The head has an assigner: its model has a ``train_cfg``."""
        return hasattr(self.head, 'assigner')

    def trained(self, taps: Taps, samples: Sequence[DetDataSample]) -> Queries:
        """The queries of the last decoder layer; encoder proposals are matched after it."""
        last = len(taps[self.loss_tap].args[0]) - 1
        scores, boxes = taps.all(self.targets_tap)[last].args[:2]
        matches = taps.all(self.match_tap)[last * len(samples) :][: len(samples)]
        objects = [call.output.gt_inds for call in matches]
        return Queries(padded(scores), in_pixels(padded(boxes), samples), objects)

    @torch.no_grad()
    def predicted(self, call: Call, samples: Sequence[DetDataSample]) -> Queries:
        """The queries of the last decoder layer, matched by the head's assigner."""
        scores, boxes = self.last_layer(call.output, len(samples))
        corners = in_pixels(padded(boxes), samples)
        objects = []
        for image, sample in enumerate(samples):
            found = InstanceData(
                scores=full_precision(scores[image]), bboxes=corners[image, : len(scores[image])]
            )
            match = self.head.assigner.assign(
                pred_instances=found, gt_instances=sample.gt_instances, img_meta=sample.metainfo
            )
            objects.append(match.gt_inds)
        return Queries(padded(scores), corners, objects)

    def last_layer(
        self, outputs: Sequence[Tensor], images: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Scores ``(Q_i, C)`` and boxes ``(Q_i, 4)`` of each image, from what the head returned."""
        return list(outputs[0][-1]), list(outputs[1][-1])

    def own_losses(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """All losses, without those on other than matched queries."""
        return {
            name: value
            for name, value in losses.items()
            if not any(part in name for part in self.other_losses)
        }

    @contextmanager
    def tell_rows(
        self, head: nn.Module, own: OwnLoss, taps: Taps, images: int, simple: SimpleRows
    ) -> Iterator[None]:
        """Within the loss of a layer, each module has a row for every query."""

        def row_mask(name: str) -> Tensor:
            calls = taps.all(self.match_tap)[-images:]
            return torch.cat(simple([call.output.gt_inds for call in calls]))

        def tell(single: Callable) -> Callable:
            def split_layer(*args: Any, **kwargs: Any) -> Any:
                own.row_mask = row_mask
                try:
                    return single(*args, **kwargs)
                finally:
                    own.row_mask = lambda name: None

            return split_layer

        with ExitStack() as stack:
            for method in self.layer_methods:
                stack.enter_context(wrapped(head, method, tell))
            yield


def in_pixels(normalised: Tensor, samples: Sequence[DetDataSample]) -> Tensor:
    """Centres and sizes in [0, 1], ``(B, Q, 4)`` -> corners in pixels."""
    # In full precision under AMP too: in half precision boxes are off by pixels.
    boxes = bbox_cxcywh_to_xyxy(full_precision(normalised))
    return boxes * image_sizes(samples, boxes).repeat(1, 2).unsqueeze(1)
