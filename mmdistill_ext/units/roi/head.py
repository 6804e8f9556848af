"""Box and mask heads of two-stage detectors, and how to run them on given RoIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import resolve
from mmdistill_ext.units.split.correctness import Detections

RUNS = ('_bbox_forward', '_mask_forward')
"""Methods that run a RoI head on given RoIs; the teacher's must not override these either."""
TRAINS = (*RUNS, 'loss', 'bbox_loss', 'predict')
"""A student's RoI head must not override these: PISA and Dynamic R-CNN sample differently, Trident
sees each image several times (it overrides `predict`)."""


class RoIHead:
    """A box or mask head of a detector's RoI head, and how to run it on given RoIs.

    Args:
        model: A two-stage detector.
        path: ``'roi_head.bbox_head'``, ``'roi_head.mask_head'``; ``'roi_head.bbox_head.0'`` for
            the first stage of a cascade.
        head_type: Class that the head should be of, with that class's targets and loss.
        key: The config key to name in errors.
        methods: Methods of the RoI head that should be those of Faster or Cascade R-CNN.

    Attributes:
        head: The head.
        loss_tap: Path of the head's method that forms targets and losses.
        targets_tap: Path of the head's method that assigns targets.
        stage: Number of the stage in a cascade, ``(int,)``; otherwise empty.
        loss_weight: Factor that the RoI head multiplies the head's losses by.

    Raises:
        ValueError: The path leads to no such head.
    """

    roi_head: StandardRoIHead
    rpn_head: Any

    def __init__(
        self, model: nn.Module, path: str, head_type: type, key: str, methods: Sequence[str] = RUNS
    ) -> None:
        self.head, method = resolve(model, path, key)
        if isinstance(self.head, nn.ModuleList):
            stages = ', '.join(f"'{path}.{stage}'" for stage in range(len(self.head)))
            raise ValueError(
                f"`{key}` should name one stage of a cascade: {stages}. Found '{path}'."
            )
        self.roi_head = getattr(model, 'roi_head', None)
        self.rpn_head = getattr(model, 'rpn_head', None)
        known = any(
            all(getattr(type(self.roi_head), m, None) is getattr(base, m) for m in methods)
            for base in (StandardRoIHead, CascadeRoIHead)
        )
        same_loss = all(
            getattr(type(self.head), name, None) is getattr(head_type, name, None)
            for name in ('get_targets', 'loss_and_target', 'loss')
        )
        fits = known and isinstance(self.head, head_type) and same_loss and method == 'forward'
        if not fits or self.roi_head is None:
            raise ValueError(
                f'`{key}` should lead to a {head_type.__name__} in the RoI head of Faster, Mask or '
                f"Cascade R-CNN. Found '{path}', a {type(self.head).__name__} in a "
                f'{type(self.roi_head).__name__}.'
            )
        self.loss_tap, self.targets_tap = f'{path}.loss_and_target', f'{path}.get_targets'
        last = path.rsplit('.', 1)[-1]
        self.stage = (int(last),) if last.isdigit() else ()
        self.loss_weight = self.roi_head.stage_loss_weights[self.stage[0]] if self.stage else 1.0

    @property
    def is_last(self) -> bool:
        """The detector predicts with this head: the last stage of a cascade, or the only one."""
        return not self.stage or self.stage[0] == self.roi_head.num_stages - 1

    @torch.no_grad()
    def run(self, method: str, features: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor]:
        """Run the head on given RoIs.

        Args:
            method: ``'_bbox_forward'`` or ``'_mask_forward'`` of the RoI head.
            features: Maps of the neck.
            rois: Image and corners of each RoI, ``(n, 5)``.
        """
        return getattr(self.roi_head, method)(*self.stage, features, rois)

    @torch.no_grad()
    def detect(
        self, features: tuple[Tensor, ...], samples: list[DetDataSample], score: float
    ) -> list[Detections]:
        """What the detector finds by itself, with proposals of its own, as when it is used.

        Args:
            features: Maps of the neck.
            samples: The batch's data samples; their sizes are read, and proposals if they bring
                some (Fast R-CNN).
            score: Score in [0, 1) above which something is found.
        """
        metas = [sample.metainfo for sample in samples]
        test_cfg = ConfigDict(self.roi_head.test_cfg, score_thr=score)
        # mmdet's proposals and NMS want one type throughout, which autocast does not give them.
        with torch.autocast(features[0].device.type, enabled=False):
            features = tuple(full_precision(level) for level in features)
            if 'proposals' in samples[0]:
                proposals = [sample.proposals for sample in samples]
            else:
                proposals = self.rpn_head.predict(features, samples, rescale=False)
            found = self.roi_head.predict_bbox(features, metas, proposals, test_cfg)
        return [Detections(image.bboxes, image.labels) for image in found]
