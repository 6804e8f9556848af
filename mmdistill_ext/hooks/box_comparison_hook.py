"""Boxes of label, student and teacher side by side, while validating."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from mmdistill_ext.compat import require_framework
from mmdistill_ext.hooks.common import plain_datasets, unwrapped_model
from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.registry import HOOKS
from mmdistill_ext.visualization.contrast import write_png

if TYPE_CHECKING:  # users of segmentation have no mmdet
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer

GAP = 4  # pixels between two panels


@HOOKS.register_module()
class BoxComparisonHook(Hook):
    """Shows what label, student and teacher say of validation images, in three panels.

    Boxes, and instance masks where there are any, are drawn by mmdet's ``DetLocalVisualizer`` on
    the original image. A picture is ``<work_dir>/<time>/vis_data/boxes/iter_<n>/<i>_<image>.png``
    and ``boxes_<i>`` in the run's visualizer. The student's predictions are those of the
    validation step; the teacher runs on the batches that hold an image to draw, on no other.

    Args:
        interval: Images from one that is drawn to the next; the first image is drawn.
        max_images: At most so many pictures per validation.
        score_thr: Predictions with a score above it are drawn, in ``[0, 1]``.
        backend_args: Where images are read from, as in ``LoadImageFromFile``; None for files.

    Raises:
        ValueError: An impossible value, a model without a teacher, one that is no detector, or
            validation data that have no labels in the original image's coordinates.
        ImportError: mmdet is not installed.
    """

    priority = 'NORMAL'

    def __init__(
        self,
        interval: int = 1,
        max_images: int = 4,
        score_thr: float = 0.3,
        backend_args: dict | None = None,
    ) -> None:
        for name, value in (('interval', interval), ('max_images', max_images)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f'`BoxComparisonHook.{name}` should be an integer >= 1. Found {value!r}.'
                )
        if not isinstance(score_thr, (int, float)) or not 0 <= score_thr <= 1:
            raise ValueError(
                f'`BoxComparisonHook.score_thr` should be in [0, 1]. Found {score_thr!r}.'
            )
        self.interval = interval
        self.max_images = max_images
        self.score_thr = score_thr
        self.backend_args = backend_args
        self.visualizer: DetLocalVisualizer | None = None
        self._seen = 0  # images of this validation

    def before_train(self, runner: Runner) -> None:
        """Check model and data; build a visualizer apart from the run's own."""
        require_framework('mmdet', '`BoxComparisonHook`')
        from mmdet.visualization import DetLocalVisualizer

        check_model(unwrapped_model(runner))
        if runner.val_loop is None:
            raise ValueError('`BoxComparisonHook` needs a `val_dataloader`. Found none.')
        dataset = runner.val_dataloader.dataset
        for part in plain_datasets(dataset):
            check_label_order(part.pipeline.transforms)
        self.visualizer = DetLocalVisualizer()  # not by get_instance, so it is in no registry
        self.visualizer.dataset_meta = getattr(dataset, 'metainfo', {})

    def before_val(self, runner: Runner) -> None:
        """Do the same for a validation without a training."""
        if self.visualizer is None:
            self.before_train(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        """Count the images from 0."""
        self._seen = 0

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: list[DetDataSample] | None = None,
    ) -> None:
        """Draw the images of the batch that are due."""
        first, self._seen = self._seen, self._seen + len(outputs)
        due = {
            index // self.interval: index - first
            for index in range(first, self._seen)
            if index % self.interval == 0 and index // self.interval < self.max_images
        }
        if not (due and is_main_process()):
            return
        step = runner.iter
        folder = Path(runner.log_dir, 'vis_data', 'boxes', f'iter_{step}')
        with isolated_rng(seed=0):  # mmdet draws the colours of masks at random
            taught = predict_as_teacher(unwrapped_model(runner), data_batch)
            for i, place in due.items():
                student, teacher = outputs[place], taught[place]
                panels = dict(
                    label=student.gt_instances,
                    student=student.pred_instances,
                    teacher=teacher.pred_instances,
                )
                image = read_image(student, self.backend_args)
                picture = compare_boxes(self.visualizer, image, panels, self.score_thr)
                write_png(folder / f'{i}_{Path(student.img_path).stem}.png', picture)
                runner.visualizer.add_image(f'boxes_{i}', picture, step)


def check_model(model: nn.Module) -> None:
    """Refuse what is no detector with a teacher."""
    from mmdet.models.detectors import BaseDetector

    if not (hasattr(model, 'distillation') and isinstance(model, BaseDetector)):
        raise ValueError(
            '`BoxComparisonHook` needs a detector with a teacher, e.g. '
            f"type='mmdistill_ext.TeacherStudentDistiller'. Found {type(model).__name__}."
        )


def check_label_order(transforms: list) -> None:
    """Refuse labels that are resized: predictions and pictures have the original image's size."""
    names = [type(transform).__name__ for transform in transforms]
    after = names[names.index('LoadAnnotations') :] if 'LoadAnnotations' in names else ['Resize']
    if any('Resize' in name for name in after):
        raise ValueError(
            '`val_dataloader.dataset.pipeline` should have LoadAnnotations after Resize, for '
            f'`BoxComparisonHook` to draw labels on the original image. Found {names}.'
        )


@torch.no_grad()
def predict_as_teacher(model: nn.Module, batch: dict) -> list[DetDataSample]:
    """Predictions of a distilled model's teacher on a batch of the loader."""
    teacher = model.distillation.teacher.model
    own = teacher.data_preprocessor
    # A teacher whose config has no preprocessor gets the student's input, as when training.
    preprocess = own if hasattr(own, '_enable_normalize') else model.data_preprocessor
    return teacher(**preprocess(batch, False), mode='predict')


def read_image(sample: DetDataSample, backend_args: dict | None = None) -> np.ndarray:
    """The original image of a data sample, ``(H, W, 3)`` uint8 RGB.

    Raises:
        ValueError: The sample does not say where its image is.
    """
    import mmcv

    if 'img_path' not in sample:
        raise ValueError(
            "`val_dataloader.dataset.pipeline` should pack 'img_path' (`meta_keys` of "
            f'PackDetInputs) for `BoxComparisonHook`. Found {sorted(sample.metainfo_keys())}.'
        )
    content = get(sample.img_path, backend_args=backend_args)
    return mmcv.imfrombytes(content, channel_order='rgb')


def compare_boxes(
    visualizer: DetLocalVisualizer,
    image: np.ndarray,
    panels: Mapping[str, InstanceData],
    score_thr: float = 0.3,
) -> np.ndarray:
    """Draw several sets of instances on one image, in panels from left to right.

    Args:
        visualizer: One that has no backends; its ``dataset_meta`` names the classes.
        image: RGB, ``(H, W, 3)`` uint8.
        panels: Caption -> instances, with ``scores`` if they are predictions.
        score_thr: Predictions with a score above it are drawn.

    Returns:
        RGB, ``(C + H, N * W + (N - 1) * GAP, 3)`` uint8: N panels under captions of C rows.
    """
    from mmdet.structures import DetDataSample

    columns = []
    for caption, instances in panels.items():
        kind = 'pred_instances' if 'scores' in instances else 'gt_instances'
        visualizer.add_datasample(
            caption,
            image,
            DetDataSample(**{kind: instances}),
            draw_gt=kind == 'gt_instances',
            draw_pred=kind == 'pred_instances',
            pred_score_thr=score_thr,
        )
        strip = _caption(caption, *image.shape[:2])
        panel = np.concatenate([strip, visualizer.get_image()])
        columns += [panel, np.full((len(panel), GAP, 3), 255, np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def _caption(text: str, image_height: int, width: int) -> np.ndarray:
    """A white strip with a name that fits into it."""
    height = max(16, image_height // 20)
    (full_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1, 1)
    strip = np.full((height, width, 3), 255, np.uint8)
    cv2.putText(
        strip,
        text,
        (2, height - height // 3),
        cv2.FONT_HERSHEY_SIMPLEX,
        min(height / 36, (width - 4) / full_width),
        (0, 0, 0),
        max(1, height // 24),
        cv2.LINE_AA,
    )
    return strip
