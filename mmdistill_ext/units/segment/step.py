"""What is known of one step of two MaskFormers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.detector_pair import IGNORED

POSITIVE, SAMPLED = 4, 6
"""Places of the matched queries, and of what was sampled, in what matches one layer and image."""


class SegmentTaps(NamedTuple):
    """Paths of the methods of the student's head whose calls are needed."""

    loss: str  # forms the losses of all decoder layers
    match: str  # matches the queries of one layer and image

    @classmethod
    def of(cls, head: str) -> SegmentTaps:
        """Paths of the methods of the head at a path."""
        return cls(f'{head}.loss_by_feat', f'{head}._get_targets_single')


class SegmentStep:
    """One step of student and teacher, each part worked out when it is first asked for.

    Segments are labelled things and kinds of stuff, ``(B, G)``, ``G`` the most of any image. ``P``
    of them are compared: those that both models have a query for, on the last decoder layer.

    Args:
        taps: Calls of the student's head.
        paths: Paths of the tapped methods.
        teacher_head: The teacher's head, whose assigner matches the teacher's queries.
        teacher_call: Call of the teacher's head.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        taps: Taps,
        paths: SegmentTaps,
        teacher_head: MaskFormerHead,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        self.taps, self.paths, self.teacher_head = taps, paths, teacher_head
        self.teacher_outputs, self.samples = teacher_call.output, samples

    @cached_property
    def truth(self) -> list[InstanceData]:
        """Each image's segments, with ``labels`` and ``masks``, as the student's loss has them."""
        return self.taps[self.paths.loss].args[2]

    @cached_property
    def student_layer(self) -> tuple[Tensor, Tensor]:
        """The student's scores ``(B, Q, C + 1)`` and masks ``(B, Q, h, w)`` of the last layer."""
        scores, masks = self.taps[self.paths.loss].args[:2]
        return scores[-1], masks[-1]

    @cached_property
    def teacher_layer(self) -> tuple[Tensor, Tensor]:
        """The teacher's scores ``(B, Q, C + 1)`` and masks ``(B, Q, h, w)`` of the last layer."""
        scores, masks = self.teacher_outputs[:2]
        return scores[-1], masks[-1]

    @cached_property
    def student_queries(self) -> Tensor:
        """The student's query for each segment, ``(B, G)``, -1 where there is none."""
        calls = self.taps.all(self.paths.match)[-len(self.samples) :]
        matches = [(c.output[SAMPLED].pos_assigned_gt_inds, c.output[POSITIVE]) for c in calls]
        return self._of_segments(matches)

    @cached_property
    @torch.no_grad()
    def teacher_queries(self) -> Tensor:
        """The teacher's query for each segment, ``(B, G)``, -1 where there is none.

        Its own assigner matches them by all pixels of its masks: Mask2Former's loss draws some.
        """
        matches = []
        for scores, masks, truth, sample in zip(
            *self.teacher_layer, self.truth, self.samples, strict=True
        ):
            found = self.teacher_head.assigner.assign(
                pred_instances=InstanceData(
                    scores=full_precision(scores), masks=full_precision(masks)
                ),
                gt_instances=InstanceData(
                    labels=truth.labels, masks=_resized(truth.masks, masks.shape[-2:])
                ),
                img_meta=sample.metainfo,
            ).gt_inds
            queries = (found > 0).nonzero().squeeze(1)
            matches.append((found[queries] - 1, queries))
        return self._of_segments(matches)

    @cached_property
    def labels(self) -> Tensor:
        """Class of each segment, ``(B, G)``, ignored where one of the models has no query."""
        classes = self._pad([image.labels for image in self.truth], IGNORED)
        both = (self.student_queries >= 0) & (self.teacher_queries >= 0)
        return classes.where(both, IGNORED)

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and segment of the compared units, two of ``(P,)``."""
        images, segments = (self.labels != IGNORED).nonzero(as_tuple=True)
        return images, segments

    @cached_property
    def masks(self) -> Tensor:
        """Masks of the compared segments, ``(P, h, w)`` bool, in the size of the student's."""
        size = self.student_layer[1].shape[-2:]
        counts = torch.bincount(self.index[0], minlength=len(self.samples)).tolist()
        chosen = self.index[1].split(counts)
        parts = zip(self.truth, chosen, strict=True)
        return torch.cat([_resized(image.masks[x], size) for image, x in parts]).bool()

    def pick_scores(self, scores: Tensor, queries: Tensor) -> Tensor:
        """Scores of queries ``(B, Q, C)`` -> of segments ``(B, C, G)``; any without a query."""
        places = queries.clamp(min=0).unsqueeze(-1).expand(-1, -1, scores.shape[-1])
        return scores.gather(1, places).transpose(1, 2)

    def pick_masks(self, masks: Tensor, queries: Tensor) -> Tensor:
        """Masks of queries ``(B, Q, h, w)`` -> of the compared segments ``(P, 1, h, w)``."""
        return masks[self.index[0], queries[self.index]].unsqueeze(1)

    def _of_segments(self, matches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Segments and queries that were matched, of each image -> queries of segments."""
        parts = []
        for (segments, queries), image in zip(matches, self.truth, strict=True):
            none = torch.full_like(image.labels, -1)
            parts.append(none.index_put((segments,), queries))
        return self._pad(parts, -1)

    def _pad(self, values: Sequence[Tensor], value: int) -> Tensor:
        return pad_sequence(list(values), batch_first=True, padding_value=value)


def _resized(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks ``(G, H, W)`` of 0 and 1 in another size, by the nearest pixel."""
    if not len(masks):
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[:, None].float(), tuple(size), mode='nearest')[:, 0].to(masks.dtype)
