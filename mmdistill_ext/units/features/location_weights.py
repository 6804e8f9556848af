"""How much each location of a feature map counts in a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdistill_ext.compat import has_framework
from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call
from mmdistill_ext.units.padding import padding_of

if TYPE_CHECKING:
    from mmdistill_ext.units.dense.family import DenseFamily

SOURCES = ('labels', 'teacher_score')


class LocationWeights:
    """Weights ``(B, 1, h, w)`` of the locations of features; those on padding are 0.

    Args:
        by: ``'labels'``: of a detector 1 on every location that a labelled box touches and 0
            elsewhere, of a segmenter the share of its pixels that are not ignored.
            ``'teacher_score'``: the teacher's largest class score in [0, 1] there. None: 1.
        student: The student.
        teacher: The teacher's model.
        key: The config key to name in errors.

    Attributes:
        teacher_calls: Path in the teacher -> number of its calls that the weights need.
        teacher_training: Paths of modules of the teacher that compute as in training, see
            :attr:`~mmdistill_ext.units.pair.HeadPair.teacher_training`.

    Raises:
        ValueError: There are no such weights for these models.
    """

    def __init__(self, by: str | None, student: nn.Module, teacher: nn.Module, key: str) -> None:
        self.by = by
        self.teacher_calls: dict[str, int] = {}
        self.teacher_training: tuple[str, ...] = ()
        if by is None:
            return
        check_choice(key, by, SOURCES)
        if by == 'labels':
            self._labels = _label_weights(student, key)
        else:
            path, self._scores = _score_maps(teacher, key)
            self.teacher_calls = {path: 1}
            if _computes_as_in_training(getattr(teacher, path)):
                self.teacher_training = (path,)
            self._path = path

    def __call__(
        self,
        features: Tensor,
        data_samples: list,
        size: tuple[int, int],
        teacher: Mapping[str, Sequence[Call]],
    ) -> Tensor | None:
        """Weights for features ``(B, C, h, w)``.

        Args:
            features: The features.
            data_samples: The batch's data samples.
            size: Height and width of the batch.
            teacher: Path -> calls of the teacher.

        Returns:
            ``(B, 1, h, w)`` float32; None when all are 1.
        """
        rows, columns = features.shape[2:]
        grid = rows, columns
        with torch.no_grad():
            weight = None
            if self.by == 'labels':
                weight = self._labels(data_samples, grid, size, features.device)
            elif self.by == 'teacher_score':
                weight = _nearest(self._scores(teacher[self._path][-1]), grid)
            return _without_padding(weight, features, data_samples, size)


def _without_padding(
    weight: Tensor | None, features: Tensor, data_samples: list, size: tuple[int, int]
) -> Tensor | None:
    """Set weights to 0 where no part of the location is in the image."""
    paddings = [padding_of(sample.metainfo, size) for sample in data_samples]
    if not any(map(any, paddings)):
        return weight
    if weight is None:
        weight = features.new_ones(len(features), 1, *features.shape[2:], dtype=torch.float32)
    down, right_of = (a / b for a, b in zip(features.shape[2:], size, strict=True))
    for image, (left, right, top, bottom) in zip(weight, paddings, strict=True):
        image[:, math.ceil((size[0] - bottom) * down) :] = 0
        image[:, :, math.ceil((size[1] - right) * right_of) :] = 0
        image[:, : math.floor(top * down)] = 0
        image[:, :, : math.floor(left * right_of)] = 0
    return weight


def touched_cells(boxes: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cells of a grid that boxes touch.

    Args:
        boxes: ``(G, 4)``, ``(x1, y1, x2, y2)`` in pixels.
        grid: Rows and columns.
        size: Height and width that the grid covers, in pixels.

    Returns:
        ``grid``, float32 0 or 1.
    """
    boxes = boxes.float()
    inside = []
    for axis in (1, 0):  # rows, columns
        cells, side = grid[1 - axis], size[1 - axis] / grid[1 - axis]
        start = torch.arange(cells, device=boxes.device) * side
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        inside.append(((low < start + side) & (high > start)).float())
    rows, columns = inside
    return (rows.T @ columns).clamp(max=1)


def _label_weights(student: BaseModel, key: str) -> Callable:
    if has_framework('mmseg'):
        from mmseg.models.segmentors import BaseSegmentor

        if isinstance(student, BaseSegmentor):
            from mmdistill_ext.units.pixel.head import MAIN, find_head

            ignored = find_head(student, MAIN, key).logits.ignore_index

            def pixels(samples: list, grid: tuple, size: tuple, device: torch.device) -> Tensor:
                labels = torch.stack([sample.gt_sem_seg.data for sample in samples])
                return F.adaptive_avg_pool2d((labels != ignored).float(), grid)

            return pixels
    if has_framework('mmdet'):
        from mmdet.models.detectors import BaseDetector
        from mmdet.structures.bbox import get_box_tensor

        if isinstance(student, BaseDetector):

            def boxes(samples: list, grid: tuple, size: tuple, device: torch.device) -> Tensor:
                labelled = (get_box_tensor(sample.gt_instances.bboxes) for sample in samples)
                cells = [touched_cells(x.to(device), grid, size) for x in labelled]
                return torch.stack(cells).unsqueeze(1)

            return boxes
    raise ValueError(
        f"`{key}`='labels' needs a student of mmsegmentation or mmdetection. Found a "
        f'{type(student).__name__}.'
    )


def _score_maps(teacher: nn.Module, key: str) -> tuple[str, Callable[[Call], list[Tensor]]]:
    """Path of a head with a score at each location, and how its scores are read."""
    if has_framework('mmseg'):
        from mmseg.models.segmentors import BaseSegmentor

        if isinstance(teacher, BaseSegmentor):
            from mmdistill_ext.units.pixel.head import MAIN, find_head

            found = find_head(teacher, MAIN, key)

            def pixels(call: Call) -> list[Tensor]:
                logits = full_precision(found.logits.of_output(call))
                scores = logits.sigmoid() if found.logits.sigmoid else logits.softmax(1)
                return [scores.amax(1, keepdim=True)]

            return found.output, pixels
    for path in ('bbox_head', 'rpn_head'):
        head = getattr(teacher, path, None)
        if head is None or not hasattr(head, 'use_sigmoid_cls'):
            continue
        if (read := _logit_reader(head)) is not None:

            def anchors(call: Call, head: Any = head, read: Callable = read) -> list[Tensor]:
                channels = head.cls_out_channels
                logits = read(call.output)[0]
                maps = [full_precision(x).unflatten(1, (-1, channels)) for x in logits]
                if head.use_sigmoid_cls:
                    scores = [x.sigmoid() for x in maps]
                else:
                    scores = [x.softmax(2)[:, :, :-1] for x in maps]
                return [x.flatten(1, 2).amax(1, keepdim=True) for x in scores]

            return path, anchors
    raise ValueError(
        f"`{key}`='teacher_score' needs a teacher with a score at each location: a per-pixel head, "
        f'a single-stage head or an RPN. Found {type(teacher).__name__}: leave it out, or take '
        "'labels'."
    )


def _logit_reader(head: nn.Module) -> Callable[[Any], Any] | None:
    """How the class logits of a head are read; None where there are none at each location."""
    family = _family(head)
    if family is not None:
        return family.outputs
    return (lambda outputs: outputs) if hasattr(head, 'prior_generator') else None


def _computes_as_in_training(head: nn.Module) -> bool:
    family = _family(head)
    return family is not None and family.teacher_trains


def _family(head: nn.Module) -> DenseFamily | None:
    """What is known of a single-stage head; None for other heads."""
    if not has_framework('mmdet'):
        return None
    import mmdistill_ext.units.dense.families  # noqa: F401  (registers mmdet's)
    from mmdistill_ext.units.dense.family import DENSE_FAMILIES

    return DENSE_FAMILIES.find(head)


def _nearest(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """The map whose grid is nearest to the given one, resized to it."""
    distances = [abs(math.log(x.shape[2] * x.shape[3] / (grid[0] * grid[1]))) for x in maps]
    best = maps[distances.index(min(distances))]
    return best if best.shape[2:] == grid else F.interpolate(best, grid, mode='bilinear')
