"""Look at labels and teacher before the first iteration, not at the 5,000th."""

from __future__ import annotations

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmdistill_ext.error_keys import errors_of_part
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.label_scan import scan_labels
from mmdistill_ext.hooks.metric_names import check_monitored
from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.registry import HOOKS


@HOOKS.register_module()
class StartCheckHook(Hook):
    """Refuses to start on labels outside the classes, or on a teacher that is not as expected.

    Args:
        check_labels: How many training samples to look at, evenly spread over the data set, as the
            pipeline gives them; 0 for none. It takes :data:`~.label_scan.SECONDS` at most. (Labels
            of the first batch are always checked, also without this hook.)
        check_teacher: Score the teacher once on the validation data.
        floor: With ``check_teacher``, metric -> smallest score that is acceptable, e.g.
            ``dict(mIoU=40.0)``, in the evaluator's unit.

    Raises:
        ValueError: A label is outside the classes, the teacher's classes are in another order than
            the data's, or the teacher scores below the floor.
    """

    priority = 'VERY_LOW'

    def __init__(
        self,
        check_labels: int = 500,
        check_teacher: bool = False,
        floor: dict[str, float] | None = None,
    ) -> None:
        if check_labels < 0:
            raise ValueError(f'`StartCheckHook.check_labels` should be >= 0. Found {check_labels}.')
        if floor and not check_teacher:
            raise ValueError(f'`StartCheckHook.floor`={floor} needs `check_teacher=True`.')
        self.check_labels = check_labels
        self.check_teacher = check_teacher
        self.floor = dict(floor or {})

    def before_train(self, runner: Runner) -> None:
        """Run the checks, leaving all random states as they are."""
        model = unwrapped_model(runner)
        distillation = getattr(model, 'distillation', None)
        if distillation is None:
            raise ValueError(
                '`StartCheckHook` needs a model with a teacher, e.g. '
                f"type='mmdistill_ext.TeacherStudentDistiller'. Found {type(model).__name__}."
            )
        check_monitored(runner)
        dataset = runner.train_dataloader.dataset
        check_class_order(distillation.teacher.classes, dataset.metainfo.get('classes'))
        known = label_range(model)
        with isolated_rng():
            if self.check_labels and known and is_main_process():
                scan_labels(dataset, self.check_labels, *known)
            if self.check_teacher:
                scores = score_teacher(runner, distillation.teacher.model)
                print_log(f'Teacher on the validation data: {scores}', logger='current')
                check_floor(scores, self.floor)


def label_range(model: BaseModel) -> tuple[int, int] | None:
    """Number of the data's classes, and the label that is ignored.

    Args:
        model: A distilled student.

    Returns:
        None for a student with losses of features alone, which do not say what its labels are.
    """
    for term in model.distillation.head_terms:
        return term.pair.data_classes, term.pair.ignore_index
    heads = [m for m in model.modules() if isinstance(getattr(m, 'num_classes', None), int)]
    heads.sort(key=lambda head: not hasattr(head, 'ignore_index'))  # segmenters copy `num_classes`
    if not heads:
        return None
    binary = hasattr(heads[0], 'ignore_index') and getattr(heads[0], 'out_channels', None) == 1
    ignored = getattr(heads[0], 'ignore_index', None)
    return 2 if binary else heads[0].num_classes, -1 if ignored is None else ignored


def check_class_order(teacher: tuple[str, ...] | None, data: tuple[str, ...] | None) -> None:
    """Refuse a teacher that knows the same classes under other indices."""
    if teacher and data and sorted(teacher) == sorted(data) and tuple(teacher) != tuple(data):
        raise ValueError(
            '`teacher.checkpoint` should have the classes in the order of the training data. '
            f'Found {tuple(teacher)} in the checkpoint, {tuple(data)} in the data.'
        )


def check_floor(scores: dict[str, float], floor: dict[str, float]) -> None:
    """Compare a teacher's scores with the smallest acceptable ones (NaN is below any)."""
    for metric, least in floor.items():
        found = {name: value for name, value in scores.items() if name.split('/')[-1] == metric}
        if not found:
            raise ValueError(
                f"`StartCheckHook.floor` should name a metric of the validation, '{metric}' is "
                f'none. Found {sorted(scores)}.'
            )
        for value in found.values():
            if not value >= least:
                raise ValueError(
                    f'The teacher should reach {metric} >= {least} on the validation data '
                    f'(`StartCheckHook.floor`). Found {value}: is `teacher.checkpoint` right?'
                )


def score_teacher(runner: Runner, teacher: BaseModel) -> dict[str, float]:
    """Metrics of the teacher on the run's own validation data and evaluator."""
    if runner.cfg.get('val_dataloader') is None or runner.cfg.get('val_evaluator') is None:
        raise ValueError(
            '`StartCheckHook.check_teacher=True` needs `val_dataloader` and `val_evaluator`. '
            'Found none.'
        )
    loader = Runner.build_dataloader(runner.cfg.val_dataloader, seed=runner.seed)
    evaluator = runner.build_evaluator(runner.cfg.val_evaluator)
    evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
    with torch.no_grad():
        for batch in loader:
            with errors_of_part('teacher.model'):
                predicted = teacher.val_step(batch)
            evaluator.process(data_samples=predicted, data_batch=batch)
    return evaluator.evaluate(len(loader.dataset))
