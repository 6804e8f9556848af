"""Sparse R-CNN (https://arxiv.org/abs/2011.12450) and QueryInst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.roi_heads import SparseRoIHead
from mmdet.models.roi_heads.bbox_heads import DIIHead
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.by_class import same_method
from mmdistill_ext.units.query.family import QUERY_FAMILIES, Queries, QueryFamily, SimpleRows
from mmdistill_ext.units.split.own_loss import OwnLoss, loss_modules


@QUERY_FAMILIES.register(DIIHead)
class Sparse(QueryFamily):
    """Queries with a RoI each, refined stage by stage; those of one stage, mostly the last.

    A teacher runs its own queries through its stages. The losses of the one stage are split.
    """

    loss_methods = ('get_targets', 'loss_and_target')
    assigner_key = 'train_cfg.rcnn'
    roi_methods = ('loss', 'bbox_loss', '_bbox_forward')
    """Methods of the RoI head that should be those of Sparse R-CNN."""

    def __init__(self, model: nn.Module, path: str, head: nn.Module) -> None:
        super().__init__(model, path, head)
        self.roi_head: Any = self.model.roi_head
        self.stage = int(path.rsplit('.', 1)[-1])
        self.loss_tap = f'{path}.loss_and_target'
        self.taps = (self.loss_tap,)
        self.teacher_tap = 'extract_feat'

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether the RoI head refines its queries as Sparse R-CNN's does."""
        head = type(getattr(model, 'roi_head', None))
        return all(same_method(head, SparseRoIHead, name) for name in cls.roi_methods)

    @property
    def predicts(self) -> bool:
        """Whether it is the last stage."""
        return self.stage == self.roi_head.num_stages - 1

    @property
    def has_assigner(self) -> bool:
        """The stages have assigners: the model has a ``train_cfg``."""
        return bool(self.roi_head.bbox_assigner)

    def trained(self, taps: Taps, samples: Sequence[DetDataSample]) -> Queries:
        """The queries of the stage, from the arguments of its loss."""
        scores, boxes, results = taps[self.loss_tap].args[:3]
        scores, boxes = (x.unflatten(0, (len(samples), -1)) for x in (scores, boxes))
        return Queries(scores, full_precision(boxes), objects_of(results, scores.shape[1]))

    @torch.no_grad()
    def predicted(self, call: Call, samples: Sequence[DetDataSample]) -> Queries:
        """The queries of the stage, matched by the stage's assigner; once for all who want it."""
        key = f'queries_{self.stage}'
        if key not in call.derived:
            call.derived[key] = self._matched(self.run(call, samples), samples)
        return call.derived[key]

    def _matched(self, found: dict[str, Any], samples: Sequence[DetDataSample]) -> Queries:
        scores = found['cls_score']
        corners = full_precision(torch.stack(list(found['detached_proposals'])))
        objects = []
        for image, sample in enumerate(samples):
            match = self.roi_head.bbox_assigner[self.stage].assign(
                pred_instances=InstanceData(
                    scores=full_precision(scores[image]), bboxes=corners[image]
                ),
                gt_instances=sample.gt_instances,
                gt_instances_ignore=None,
                img_meta=sample.metainfo,
            )
            objects.append(match.gt_inds)
        return Queries(scores, corners, objects)

    @torch.no_grad()
    def run(self, call: Call, samples: Sequence[DetDataSample]) -> dict[str, Any]:
        """Run the queries as far as the stage, as for a prediction; once for all who want it.

        Args:
            call: Call of the detector's ``extract_feat``.
            samples: The batch's data samples, for the sizes of the images.
        """
        stages: dict[int, dict[str, Any]] = call.derived.setdefault('query_stages', {})
        if self.stage not in stages:
            features, metas = call.output, [sample.metainfo for sample in samples]
            proposals = self.model.rpn_head.predict(features, samples)
            boxes = [found.bboxes for found in proposals]
            queries = torch.stack([found.features for found in proposals])
            for stage in range(self.stage + 1):
                rois = bbox2roi(boxes)
                found = self.roi_head._bbox_forward(stage, features, rois, queries, metas)
                boxes, queries = found['detached_proposals'], found['object_feats']
                stages[stage] = found
        return stages[self.stage]

    def own_losses(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """The losses of the stage, times its weight."""
        weight, own = self.roi_head.stage_loss_weights[self.stage], loss_modules(self.head)
        return {name: weight * x for name, x in losses['loss_bbox'].items() if name in own}

    @contextmanager
    def tell_rows(
        self, head: nn.Module, own: OwnLoss, taps: Taps, images: int, simple: SimpleRows
    ) -> Iterator[None]:
        """Classes have a row for every query, boxes for those with an object."""

        def row_mask(name: str) -> Tensor:
            scores, _, results = taps[self.loss_tap].args[:3]
            objects = objects_of(results, len(scores) // images)
            rows = torch.cat(simple(objects))
            return rows if name == 'loss_cls' else rows[torch.cat(objects) > 0]

        own.row_mask = row_mask
        yield


def objects_of(results: Sequence[Any], count: int) -> list[Tensor]:
    """Object of each of ``count`` queries, from 1 on, 0 for none, by image, from the sampling."""
    return [
        result.pos_inds.new_zeros(count).index_put(
            (result.pos_inds,), result.pos_assigned_gt_inds + 1
        )
        for result in results
    ]
