"""Boxes of label, student and teacher side by side, while validating."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmdistill_ext.compat import require_framework
from mmdistill_ext.dataset_configs import follow_pipeline, plain_datasets
from mmdistill_ext.error_keys import errors_of_part
from mmdistill_ext.functional.checks import given
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.pictures import Pictures
from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.registry import HOOKS
from mmdistill_ext.transforms.unchanged import as_array
from mmdistill_ext.visualization.boxes import check_path, compare_boxes, read_image
from mmdistill_ext.visualization.contrast import write_png

if TYPE_CHECKING:  # users of segmentation have no mmdet
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer


@HOOKS.register_module()
class BoxComparisonHook(Hook):
    """Shows what label, student and teacher say of validation images, in three panels.

    Boxes, and instance masks where there are any, are drawn by mmdet's ``DetLocalVisualizer`` on
    the original image. A picture is ``<work_dir>/<time>/vis_data/boxes/iter_<n>/<i>_<image>.png``
    and ``boxes_<i>`` in the run's visualizer. The student's predictions are those of the
    validation step; the teacher runs only on batches with an image to draw.

    Args:
        interval: Every ``interval``-th image is drawn, beginning with the first.
        max_images: Maximum number of pictures per validation.
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
        self.pictures = Pictures(type(self).__name__)
        self._seen = 0  # images of this validation
        self._due: list[tuple[int, DetDataSample, dict[str, InstanceData]]] = []

    def before_train(self, runner: Runner) -> None:
        """Check model and data; build a visualizer that is not the run's."""
        require_framework('mmdet', '`BoxComparisonHook`')
        from mmdet.visualization import DetLocalVisualizer

        check_model(unwrapped_model(runner))
        if runner.val_loop is None:
            raise ValueError('`BoxComparisonHook` needs a `val_dataloader`. Found none.')
        dataset = runner.val_dataloader.dataset
        for part in plain_datasets(dataset):
            check_samples(part)
        batch = runner.val_dataloader.collate_fn([dataset[0]])
        with isolated_rng(), errors_of_part('teacher.model'):  # fails now if it ever does
            predict_as_teacher(unwrapped_model(runner), batch)
        self.visualizer = DetLocalVisualizer()  # not by get_instance, so it is in no registry
        self.visualizer.dataset_meta = getattr(dataset, 'metainfo', {})

    def before_val(self, runner: Runner) -> None:
        """Check model and data, and build the visualizer, also in a run that only validates."""
        if self.visualizer is None:
            self.before_train(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        """Count the images from 0."""
        self._seen = 0
        self._due = []

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: list[DetDataSample] | None = None,
    ) -> None:
        """Keep what is said of the images of the batch that are due."""
        outputs = given(outputs, 'outputs')
        first, self._seen = self._seen, self._seen + len(outputs)
        due = {
            index // self.interval: index - first
            for index in range(first, self._seen)
            if index % self.interval == 0 and index // self.interval < self.max_images
        }
        if not (due and is_main_process()):
            return
        batch = given(data_batch, 'data_batch')
        with self.pictures.guarded(), isolated_rng(seed=0):
            taught = predict_as_teacher(unwrapped_model(runner), batch)
            for i, place in due.items():
                student, teacher = outputs[place].cpu(), taught[place].cpu()
                panels = dict(
                    label=student.gt_instances,
                    student=student.pred_instances,
                    teacher=teacher.pred_instances,
                )
                self._due.append((i, student, panels))

    def after_val(self, runner: Runner) -> None:
        """Draw, now that the best checkpoint is saved."""
        step = runner.iter
        folder = Path(runner.log_dir, 'vis_data', 'boxes', f'iter_{step}')
        while self._due:
            i, sample, panels = self._due.pop(0)
            # mmdet draws the colours of masks at random
            with self.pictures.guarded(), isolated_rng(seed=i):
                image = read_image(sample, self.backend_args)
                picture = compare_boxes(self.visualizer, image, panels, self.score_thr)
                write_png(folder / f'{i}_{Path(sample.img_path).stem}.png', picture)
                runner.visualizer.add_image(f'boxes_{i}', picture, step)


def check_model(model: BaseModel) -> None:
    """Refuse a model that is no detector with a teacher."""
    from mmdet.models.detectors import BaseDetector

    if not (hasattr(model, 'distillation') and isinstance(model, BaseDetector)):
        raise ValueError(
            '`BoxComparisonHook` needs a detector with a teacher, e.g. '
            f"type='mmdistill_ext.TeacherStudentDistiller'. Found {type(model).__name__}."
        )


def check_samples(dataset: BaseDataset) -> None:
    """Refuse validation data that do not say where images are, or whose labels are moved.

    The first image's labels are followed through the pipeline: predictions and pictures have the
    original image's size, so labels have to keep the numbers that they are loaded with.
    """
    names = [type(transform).__name__ for transform in dataset.pipeline.transforms]
    with isolated_rng():
        steps = list(follow_pipeline(dataset, 0))
    labels = [as_array(step['gt_bboxes']) for step in steps if 'gt_bboxes' in step]
    scales = [step.get('scale_factor') for step in steps if 'gt_bboxes' in step]
    moved = any(not np.array_equal(one, labels[0]) for one in labels)
    if not labels or moved or scales[0] != scales[-1]:
        raise ValueError(
            '`val_dataloader.dataset.pipeline` should have LoadAnnotations after Resize, for '
            f'`BoxComparisonHook` to draw labels on the original image. Found {names}.'
        )
    check_path(steps[-1]['data_samples'])


@torch.no_grad()
def predict_as_teacher(model: BaseModel, batch: dict) -> list[DetDataSample]:
    """Predictions of a distilled model's teacher on a batch of the loader."""
    teacher = model.distillation.teacher.model
    preprocessor = teacher.data_preprocessor
    # A teacher whose config has no preprocessor gets the student's input, as when training.
    if not hasattr(preprocessor, '_enable_normalize'):
        preprocessor = model.data_preprocessor
    return teacher(**preprocessor(batch, False), mode='predict')
