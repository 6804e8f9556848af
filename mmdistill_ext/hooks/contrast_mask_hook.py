"""Contrast masks of training batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmdistill_ext.functional import contrast_mask
from mmdistill_ext.functional.checks import given
from mmdistill_ext.hooks.batch_geometry import BatchGeometry
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.pictures import Pictures
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import HOOKS
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.visualization.contrast import check_contrast_values, contrast_overlay, write_png


@HOOKS.register_module()
class ContrastMaskHook(Hook):
    """Shows where the teacher beats the student, every ``interval`` iterations (SEL-4, SEL-8).

    Every image of the batch gives a mask,
    ``<work_dir>/<time>/vis_data/contrast_masks/iter_<n>/<loss>/<i>_<image>.png``, of the size that
    it has when it leaves the pipeline, whatever the preprocessor makes of the batch (padding,
    ``batch_augments`` that resize); and an overlay in the visualizer, so in local files,
    TensorBoard and whatever else the config names. The masks are those of the training step itself:
    there is no second forward. A picture that fails is a warning in the log.

    Args:
        interval: Iterations between pictures.
        max_images: Maximum number of images per batch.
        values: Grey values of the masks, any of ``teacher`` (255), ``student`` (0), ``void`` (128).
        alpha: Weight of the colour in overlays, in ``[0, 1]``.
        losses: Names of the losses to show; all that compare when not given.

    Raises:
        ValueError: An impossible value, or a loss that does not exist or does not compare.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def __init__(
        self,
        interval: int = 500,
        max_images: int = 4,
        values: Mapping[str, int] | None = None,
        alpha: float = 0.5,
        losses: list[str] | None = None,
    ) -> None:
        for name, value in (('interval', interval), ('max_images', max_images)):
            if value < 1:
                raise ValueError(f'`ContrastMaskHook.{name}` should be >= 1. Found {value}.')
        if not 0 <= alpha <= 1:
            raise ValueError(f'`ContrastMaskHook.alpha` should be in [0, 1]. Found {alpha}.')
        self.interval = interval
        self.max_images = max_images
        self.values = check_contrast_values(values, 'ContrastMaskHook.values')
        self.alpha = alpha
        self.names = losses
        self.losses: dict[str, DistillLoss] = {}
        self.pictures = Pictures(type(self).__name__)
        self._geometry: BatchGeometry | None = None

    def before_train(self, runner: Runner) -> None:
        """Find the losses."""
        model = unwrapped_model(runner)
        found = getattr(model, 'distillation', None)
        losses = found.losses if found else {}
        comparing = {name: loss for name, loss in losses.items() if hasattr(loss, 'records')}
        wrong = sorted(set(self.names or ()) - set(comparing))
        if wrong or not comparing:
            raise ValueError(
                '`ContrastMaskHook.losses` should name losses that compare teacher and student: '
                f'{sorted(comparing) or "there are none"}. Found {wrong or self.names}.'
            )
        self.losses = {name: comparing[name] for name in self.names or comparing}

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Ask the losses to keep their comparison, and note where images lie in the batch."""
        if is_main_process() and self.every_n_train_iters(runner, self.interval):
            for loss in self.losses.values():
                loss.records.keep_contrast = True
            self._geometry = BatchGeometry(unwrapped_model(runner).data_preprocessor)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Write masks and overlays of the comparison that the losses kept."""
        if not (is_main_process() and self.every_n_train_iters(runner, self.interval)):
            return
        geometry, self._geometry = given(self._geometry, 'BatchGeometry'), None
        geometry.close()
        for name, loss in self.losses.items():
            loss.records.keep_contrast = False
            contrast = loss.records.pop_contrast()
            if contrast is not None:  # else the loss is off at this iteration
                with self.pictures.guarded():
                    self._draw(runner, name, contrast, given(data_batch, 'data_batch'), geometry)

    def _draw(
        self, runner: Runner, name: str, contrast: Contrast, batch: dict, geometry: BatchGeometry
    ) -> None:
        step = runner.iter + 1
        folder = Path(runner.log_dir, 'vis_data', 'contrast_masks', f'iter_{step}', name)
        for level, (wins, valid) in contrast.maps().items():
            masks = contrast_mask(wins[: self.max_images], valid[: self.max_images], **self.values)
            shown = on_images(batch, masks.cpu().numpy(), geometry)
            for i, (image, stem, mask) in enumerate(shown):
                write_png(folder / f'{i}_{stem}{level}.png', mask)
                overlay = contrast_overlay(image, mask, self.values, self.alpha)
                runner.visualizer.add_image(f'contrast_{name}_{i}{level}', overlay, step)


def on_images(
    data_batch: dict, masks: np.ndarray, geometry: BatchGeometry
) -> Iterator[tuple[np.ndarray, str, np.ndarray]]:
    """Image (RGB), name and mask of each sample, at the size before the batch was formed.

    Args:
        data_batch: What the loader gave.
        masks: Masks of the first images of the batch, ``(b, H', W')``, in pixels of the batch.
        geometry: Where the images lie in the batch.
    """
    batch = zip(data_batch['inputs'], data_batch['data_samples'], strict=True)
    for place, ((inputs, sample), mask) in enumerate(zip(batch, masks, strict=False)):
        image = _to_rgb(inputs)
        rows, columns = geometry.pixels(place, image.shape[:2], sample.metainfo, mask.shape)
        path = getattr(sample, 'img_path', None)
        yield image, Path(path).stem if path else 'image', mask[rows[:, None], columns]


def _to_rgb(inputs: Tensor) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB from the loader's BGR ``(3, H, W)``.

    Of images with more channels the first three are taken, of those with fewer the first one.
    """
    pixels = inputs.detach().clamp(0, 255).byte().cpu().numpy().transpose(1, 2, 0)
    colour = pixels[..., 2::-1] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)
    return np.ascontiguousarray(colour)
