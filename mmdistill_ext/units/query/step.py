"""What is known of one step of two DETRs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from mmdet.models.dense_heads import DETRHead
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.detector_pair import IGNORED, Truth, ground_truth


class QueryTaps(NamedTuple):
    """Paths of the methods of the student's head whose calls are needed."""

    loss: str  # forms the losses of all decoder layers
    layer: str  # forms the losses of one layer
    match: str  # matches the queries of one layer and image

    @classmethod
    def of(cls, head: str) -> QueryTaps:
        """Paths of the methods of the head at a path."""
        return cls(f'{head}.loss_by_feat', f'{head}.loss_by_feat_single', f'{head}.assigner.assign')


class QueryStep:
    """One step of student and teacher, each part worked out when it is first asked for.

    Units are labelled objects, ``(B, G)``, ``G`` the most objects of any image. ``P`` of them are
    compared: those that both models have a query for.

    Args:
        taps: Calls of the student's head.
        paths: Paths of the tapped methods.
        teacher_head: The teacher's head, which matches the teacher's queries.
        teacher_call: Call of the teacher's head.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        taps: Taps,
        paths: QueryTaps,
        teacher_head: DETRHead,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        self.taps, self.paths, self.teacher_head = taps, paths, teacher_head
        self.teacher_outputs, self.samples = teacher_call.output, samples

    @cached_property
    def truth(self) -> list[Truth]:
        """Boxes, classes and ignored boxes of each image."""
        return ground_truth(self.samples)

    @cached_property
    def counts(self) -> list[int]:
        """Number of objects of each image."""
        return [len(image.classes) for image in self.truth]

    @cached_property
    def student_layer(self) -> tuple[Tensor, Tensor]:
        """The student's scores ``(B, Q, C)`` and boxes ``(B, Q, 4)`` of the last decoder layer."""
        return self.taps.all(self.paths.layer)[self.layers - 1].args[:2]

    @cached_property
    def layers(self) -> int:
        """Number of the student's decoder layers; encoder proposals are matched after them."""
        return len(self.taps[self.paths.loss].args[0])

    @cached_property
    def teacher_layer(self) -> tuple[Tensor, Tensor]:
        """The teacher's scores ``(B, Q, C)`` and boxes ``(B, Q, 4)`` of the last decoder layer."""
        scores, boxes = self.teacher_outputs[:2]
        return scores[-1], boxes[-1]

    @cached_property
    def sizes(self) -> Tensor:
        """Width and height of each image, ``(B, 2)``."""
        sizes = [sample.metainfo['img_shape'][:2][::-1] for sample in self.samples]
        return self.teacher_outputs[1].new_tensor(sizes, dtype=torch.float32)

    @cached_property
    def student_queries(self) -> Tensor:
        """The student's query for each object, ``(B, G)``, -1 where there is none."""
        images = len(self.samples)
        calls = self.taps.all(self.paths.match)[(self.layers - 1) * images :][:images]
        return self.of_objects([call.output.gt_inds for call in calls])

    @cached_property
    def teacher_matches(self) -> list[Tensor]:
        """For each image the object of each teacher's query ``(Q,)``, from 1 on, 0 for none."""
        scores, boxes = self.teacher_layer
        boxes, matches = self.in_pixels(boxes), []
        for image, sample in enumerate(self.samples):
            predicted = InstanceData(scores=full_precision(scores[image]), bboxes=boxes[image])
            match = self.teacher_head.assigner.assign(
                pred_instances=predicted,
                gt_instances=sample.gt_instances,
                img_meta=sample.metainfo,
            )
            matches.append(match.gt_inds)
        return matches

    @cached_property
    def teacher_queries(self) -> Tensor:
        """The teacher's query for each object, ``(B, G)``, -1 where there is none."""
        return self.of_objects(self.teacher_matches)

    @cached_property
    def all_labels(self) -> Tensor:
        """Class of each object, ``(B, G)``, ignored beyond the objects of an image."""
        return self.pad([image.classes for image in self.truth], IGNORED)

    @cached_property
    def all_targets(self) -> Tensor:
        """Box of each object, ``(B, G, 4)``, zeros beyond the objects of an image."""
        return self.pad([image.boxes for image in self.truth])

    @cached_property
    def labels(self) -> Tensor:
        """Class of each object, ``(B, G)``, ignored where one of the models has no query."""
        both = (self.student_queries >= 0) & (self.teacher_queries >= 0)
        return self.all_labels.where(both, IGNORED)

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and object of the compared units, two of ``(P,)``."""
        images, objects = (self.labels != IGNORED).nonzero(as_tuple=True)
        return images, objects

    @cached_property
    def target_boxes(self) -> Tensor:
        """Boxes of the compared objects, ``(P, 4)``."""
        return self.all_targets[self.index]

    @property
    def student_boxes(self) -> Tensor:
        """The student's boxes of the compared objects, ``(P, 4)``."""
        boxes = self.pick(self.student_layer[1], self.student_queries)
        return self.in_pixels(boxes)[self.index]

    @cached_property
    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes of the compared objects, ``(P, 4)``."""
        boxes = self.pick(self.teacher_layer[1], self.teacher_queries)
        return self.in_pixels(boxes)[self.index]

    def of_objects(self, matches: Sequence[Tensor]) -> Tensor:
        """Objects of queries -> queries of objects, ``(B, G)``, -1 where there is none."""
        queries = []
        for objects, count in zip(matches, self.counts, strict=True):
            none = objects.new_full((count,), -1, dtype=torch.long)
            matched = (objects > 0).nonzero().squeeze(1)
            queries.append(none.index_put((objects[matched] - 1,), matched))
        return self.pad(queries, -1)

    def pick(self, values: Tensor, queries: Tensor) -> Tensor:
        """Values of queries ``(B, Q, D)`` -> of objects ``(B, G, D)``; any without a query."""
        places = queries.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
        return values.gather(1, places)

    def in_pixels(self, normalised: Tensor) -> Tensor:
        """Centres and sizes in [0, 1], ``(B, ..., 4)`` -> corners in pixels."""
        # In full precision under AMP too: in half precision boxes are off by pixels.
        boxes = bbox_cxcywh_to_xyxy(full_precision(normalised))
        return boxes * self.sizes.repeat(1, 2).unsqueeze(1)

    def pad(self, values: Sequence[Tensor], value: float = 0) -> Tensor:
        """``(G_i, ...)`` of each image -> ``(B, G, ...)``."""
        return pad_sequence(list(values), batch_first=True, padding_value=value)
