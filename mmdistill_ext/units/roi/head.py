"""Box and mask heads of two-stage detectors, and how to run them on given RoIs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import Tensor, nn

from mmdistill_ext.taps import resolve

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
