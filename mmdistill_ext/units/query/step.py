"""One step of a pair of DETRs: what is known of it, and the split of its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.functional.logits.selective import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import SplitRule
from mmdistill_ext.units.boxes import overlaps
from mmdistill_ext.units.detector_pair import IGNORED, ground_truth
from mmdistill_ext.units.split.correctness import correct_images, correct_units
from mmdistill_ext.units.split.head_split import HeadSplit

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample

    from mmdistill_ext.units.query.pair import QueryPair


class QueryStep:
    """What is known of one step, worked out when it is first asked for.

    Units are objects, ``(B, G)``, ``G`` the most in any image.
    """

    def __init__(
        self, pair: QueryPair, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]
    ) -> None:
        self.pair, self.taps, self.outputs = pair, taps, teacher_call.output
        self.samples = data_samples
        self.truth = ground_truth(data_samples)
        self.counts = [len(classes) for _, classes, _ in self.truth]

    @cached_property
    def student_layer(self) -> tuple[Tensor, Tensor]:
        """The student's scores ``(B, Q, C)`` and boxes ``(B, Q, 4)`` of the last decoder layer."""
        return self.taps.all(self.pair.layer_tap)[self.layers - 1].args[:2]

    @cached_property
    def layers(self) -> int:
        """Decoder layers of the student; its encoder's proposals may be matched after them."""
        return len(self.taps[self.pair.student_tap].args[0])

    @cached_property
    def teacher_layer(self) -> tuple[Tensor, Tensor]:
        """The same of the teacher."""
        scores, boxes = self.outputs[:2]
        return scores[-1], boxes[-1]

    @cached_property
    def sizes(self) -> Tensor:
        """Width and height of each image, ``(B, 2)``."""
        sizes = [sample.metainfo['img_shape'][:2][::-1] for sample in self.samples]
        return self.outputs[1].new_tensor(sizes, dtype=torch.float32)

    @cached_property
    def student_queries(self) -> Tensor:
        """The query of each object ``(B, G)``, -1 where none."""
        images = len(self.samples)
        calls = self.taps.all(self.pair.match_tap)[(self.layers - 1) * images :][:images]
        return self.of_objects([call.output.gt_inds for call in calls])

    @cached_property
    def teacher_matches(self) -> list[Tensor]:
        """Of each image, the object of each query ``(Q,)``, counted from 1, 0 where none."""
        scores, boxes = self.teacher_layer
        boxes, assigner = self.boxes(boxes), self.pair.teacher_head.assigner
        matches = []
        for image, sample in enumerate(self.samples):
            predicted = InstanceData(scores=full_precision(scores[image]), bboxes=boxes[image])
            found = assigner.assign(
                pred_instances=predicted,
                gt_instances=sample.gt_instances,
                img_meta=sample.metainfo,
            )
            matches.append(found.gt_inds)
        return matches

    @cached_property
    def teacher_queries(self) -> Tensor:
        """The query of each object ``(B, G)``, -1 where none."""
        return self.of_objects(self.teacher_matches)

    @cached_property
    def all_labels(self) -> Tensor:
        """``(B, G)``."""
        return self.pad([classes for _, classes, _ in self.truth], IGNORED)

    @cached_property
    def all_targets(self) -> Tensor:
        """``(B, G, 4)``."""
        return self.pad([boxes for boxes, *_ in self.truth])

    @cached_property
    def labels(self) -> Tensor:
        """``(B, G)``, of objects that both have a query for."""
        both = (self.student_queries >= 0) & (self.teacher_queries >= 0)
        return self.all_labels.where(both, IGNORED)

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and object of the units that are compared."""
        return (self.labels != IGNORED).nonzero(as_tuple=True)

    @cached_property
    def target_boxes(self) -> Tensor:
        """Of these, ``(P, 4)``."""
        return self.all_targets[self.index]

    @cached_property
    def teacher_boxes(self) -> Tensor:
        """Of these, ``(P, 4)``."""
        boxes = self.pick(self.teacher_layer[1], self.teacher_queries)
        return self.boxes(boxes)[self.index]

    def of_objects(self, matches: list[Tensor]) -> Tensor:
        """Objects of queries -> queries of objects, ``(B, G)``, -1 where none."""
        queries = []
        for objects, count in zip(matches, self.counts, strict=True):
            found = objects.new_full((count,), -1, dtype=torch.long)
            matched = (objects > 0).nonzero().squeeze(1)
            queries.append(found.index_put((objects[matched] - 1,), matched))
        return self.pad(queries, -1)

    def pick(self, values: Tensor, queries: Tensor) -> Tensor:
        """``(B, Q, D)`` -> ``(B, G, D)``; of objects without a query the first one's."""
        places = queries.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
        return values.gather(1, places)

    def boxes(self, normalised: Tensor) -> Tensor:
        """Centres and sizes in [0, 1], ``(B, ..., 4)``, -> boxes in pixels."""
        # In full precision under AMP too: half of it is pixels off.
        boxes = bbox_cxcywh_to_xyxy(full_precision(normalised))
        return boxes * self.sizes.repeat(1, 2).unsqueeze(1)

    def pad(self, values: list[Tensor], value: float = 0) -> Tensor:
        """``(G_i, ...)`` of each image -> ``(B, G, ...)``."""
        return pad_sequence(values, batch_first=True, padding_value=value)


class QuerySplit(HeadSplit):
    """The split of the own losses of a head's layers.

    An object is as simple as the teacher's query for it; queries without an object are simple when
    queries are split. The denoising queries of DINO are left alone.
    """

    def __init__(self, pairing: QueryStep, split: SplitRule) -> None:
        head = pairing.taps.owner(pairing.pair.student_tap)
        super().__init__(head, split, len(pairing.samples))
        self.pairing = pairing

    @property
    def valid(self) -> Tensor:
        """``(B, G)`` bool."""
        return self.pairing.all_labels != IGNORED

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """``(B, G)`` or ``(B,)``, what the teacher has right."""
        found, head = self.pairing, self.pairing.pair.teacher_head
        scores, boxes = found.teacher_layer
        scores = full_precision(scores)
        scores = scores.sigmoid() if found.pair.sigmoid else scores.softmax(-1)
        limits = (self.split.iou, self.split.score)
        if self.split.by == 'unit':
            labels = found.all_labels.where(found.teacher_queries >= 0, IGNORED)
            index = (labels != IGNORED).nonzero(as_tuple=True)
            boxes = found.boxes(found.pick(boxes, found.teacher_queries))[index]
            ious = overlaps(boxes, found.all_targets[index])
            scores = found.pick(scores, found.teacher_queries)
            right = correct_units(scores, labels, head.num_classes, index, ious, *limits)
            return right & (labels != IGNORED)
        boxes = found.boxes(boxes)
        labels = torch.stack(
            [(match == 0).long() * head.num_classes for match in found.teacher_matches]
        )
        return correct_images(
            scores[..., : head.num_classes],
            labels,
            torch.ones_like(labels, dtype=torch.bool),
            lambda image, queries, classes: boxes[image, queries],
            found.truth,
            *limits,
        )

    def layer(self, single: Callable) -> Callable:
        """Tell the loss modules of one layer which of its queries are simple."""

        def split_layer(*args, **kwargs):
            self.loss.rows = lambda name: self._rows()
            try:
                return single(*args, **kwargs)
            finally:
                self.loss.rows = lambda name: None

        return split_layer

    def _rows(self) -> Tensor:
        """``(B * Q,)``, of the layer that was matched last."""
        found, rows = self.pairing, []
        calls = found.taps.all(found.pair.match_tap)[-len(found.samples) :]
        for image, call in enumerate(calls):
            objects = call.output.gt_inds
            if self.split.by == 'image':
                rows.append(self.right[image].expand(len(objects)))
            else:
                rows.append(torch.cat((self.right.new_ones(1), self.right[image]))[objects])
        return torch.cat(rows)
