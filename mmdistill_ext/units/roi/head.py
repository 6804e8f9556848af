"""Box and mask heads of two-stage detectors, and how to run them on given RoIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from torch import Tensor, nn

import mmdistill_ext.units.roi.families  # noqa: F401  (registers mmdet's)
from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, resolve
from mmdistill_ext.units.by_class import ByClass
from mmdistill_ext.units.detector_pair import FEATURES_INSTEAD
from mmdistill_ext.units.roi.family import ROI_FAMILIES, RoIFamily
from mmdistill_ext.units.split.correctness import Detections


class RoIHead:
    """A box or mask head of a detector's RoI head, and how to run it on given RoIs.

    Args:
        model: A two-stage detector.
        path: ``'roi_head.bbox_head'``, ``'roi_head.mask_head'``; of a cascade that is the last
            stage, which predicts, ``'roi_head.bbox_head.0'`` is the first one.
        key: The config key to name in errors.
        trains: The head is that of a student: its RoI head should sample as mmdet's do.

    Attributes:
        path: The path, with the stage of a cascade.
        head: The head.
        family: Reads and runs the RoI head.
        reader: Reads the head.
        stage: Number of the stage in a cascade, ``(int,)``; otherwise empty.
        loss_tap: Path of the head's method that forms targets and losses.
        targets_tap: Path of the head's method that assigns targets.
        loss_weight: Factor that the RoI head multiplies the head's losses by.

    Raises:
        ValueError: The path leads to no such head.
    """

    heads: ClassVar[ByClass]
    """Class of the heads -> what reads them; its ``loss_methods`` are those of that class."""
    method: ClassVar[str]
    """Method of the RoI head that runs the head on given RoIs."""

    def __init__(self, model: nn.Module, path: str, key: str, trains: bool = False) -> None:
        self.head, method = resolve(model, path, key)
        if isinstance(self.head, nn.ModuleList):  # stages of a cascade
            path = f'{path}.{len(self.head) - 1}'
            self.head = self.head[-1]
        self.path = path
        self.roi_head: Any = getattr(model, 'roi_head', None)
        self.rpn_head: Any = getattr(model, 'rpn_head', None)
        self.stage = stage_of(path)
        family = self._family(trains)
        reader = self._reader() if method == 'forward' else None
        if family is None or reader is None or self.roi_head is None:
            raise ValueError(
                f'`{key}` should lead to one of {self.heads}, or to a subclass with their targets '
                f'and loss, in one of {ROI_FAMILIES}. Found {path!r}, a {type(self.head).__name__} '
                f'in a {type(self.roi_head).__name__}. {FEATURES_INSTEAD}'
            )
        self.family: RoIFamily = family(self.roi_head)
        self.reader: Any = reader(self.head)
        self.loss_tap = f'{path}.loss_and_target'
        self.targets_tap = f'{path}.get_targets'
        self.loss_weight = self.family.loss_weight(self.stage, self.method)

    def _family(self, trains: bool) -> type[RoIFamily] | None:
        family = ROI_FAMILIES.find(self.roi_head)
        if family is None:
            return None
        methods: Sequence[str] = (*family.runs, *(family.trains if trains else ()))
        return ROI_FAMILIES.find(self.roi_head, methods)

    def _reader(self) -> Any:
        reader = self.heads.find(self.head)
        return self.heads.find(self.head, reader.loss_methods) if reader else None

    @property
    def is_last(self) -> bool:
        """The detector predicts with this head: the last stage of a cascade, or the only one."""
        return self.family.predicts(self.stage)

    def run(self, features: Call, rois: Tensor) -> dict[str, Any]:
        """Run the head on given RoIs.

        Args:
            features: The call that gave the maps of the neck.
            rois: Image and corners of each RoI, ``(n, 5)``.
        """
        context = self._context(features)
        return self.family.run(self.method, self.stage, features.output, rois, context)

    @torch.no_grad()
    def detect(
        self, features: Call, samples: list[DetDataSample], score: float
    ) -> list[Detections]:
        """What the detector finds by itself, with proposals of its own, as when it is used.

        It is worked out once for the features, however many heads ask for it.

        Args:
            features: The call that gave the maps of the neck.
            samples: The batch's data samples; their sizes are read, and proposals if they bring
                some (Fast R-CNN).
            score: Score in [0, 1) above which something is found.
        """
        known = f'detections above {score}'
        if known not in features.derived:
            features.derived[known] = self._detect(features, samples, score)
        return features.derived[known]

    def _detect(
        self, features: Call, samples: list[DetDataSample], score: float
    ) -> list[Detections]:
        metas = [sample.metainfo for sample in samples]
        test_cfg = ConfigDict(self.roi_head.test_cfg, score_thr=score)
        # mmdet's proposals and NMS want one type throughout, which autocast does not give them.
        with torch.autocast(features.output[0].device.type, enabled=False):
            maps = tuple(full_precision(level) for level in features.output)
            if 'proposals' in samples[0]:
                proposals = [sample.proposals for sample in samples]
            else:
                proposals = self.rpn_head.predict(maps, samples, rescale=False)
            found = self.roi_head.predict_bbox(
                maps, metas, proposals, test_cfg, **self.family.context(maps)
            )
        return [Detections(image.bboxes, image.labels) for image in found]

    def _context(self, features: Call) -> Any:
        if 'roi_context' not in features.derived:
            features.derived['roi_context'] = self.family.context(features.output)
        return features.derived['roi_context']


def stage_of(path: str) -> tuple[int, ...]:
    """Number of the stage that a path ends with, ``(int,)``; empty where it names none."""
    last = path.rsplit('.', 1)[-1]
    return (int(last),) if last.isdigit() else ()


def same_stage(model: nn.Module, path: str) -> str:
    """The path of another model's head, in a model that may have other stages (SEL-7).

    The same stage where there is one; else the last stage, or the only head.

    Args:
        model: A two-stage detector.
        path: Path of a head in another two-stage detector.
    """
    stage, parent = stage_of(path), path.rsplit('.', 1)[0]
    if not stage:
        return path
    stages = getattr(getattr(model, 'roi_head', None), parent.removeprefix('roi_head.'), None)
    has_stage = isinstance(stages, nn.ModuleList) and stage[0] < len(stages)
    return path if has_stage else parent
