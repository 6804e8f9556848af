"""How often the teacher is better, as scalars of the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner
from torch import Tensor

from mmdistill_ext.hooks.common import publish, unwrapped_model
from mmdistill_ext.registry import HOOKS


@HOOKS.register_module()
class TeacherShareHook(Hook):
    """Logs the share of units where the teacher beats the student (SEL-8).

    ``train/teacher_better/<loss>`` is the share of all units since the last log, of every rank;
    ``train/teacher_better/<loss>/<class>`` is the share of the units with this label. A share of no
    units is not logged. The losses count on the device; there is one host sync per log.

    Args:
        interval: Iterations between logs; as the run's ``LoggerHook`` when not given.
        per_class: Log the classes too.

    Raises:
        ValueError: ``interval`` is not positive, or the model has no teacher.
    """

    priority = 'NORMAL'  # before LoggerHook, which prints what is found then

    def __init__(self, interval: int | None = None, per_class: bool = True) -> None:
        if interval is not None and interval <= 0:
            raise ValueError(f'`TeacherShareHook.interval` should be > 0. Found {interval}.')
        self.interval = interval
        self.per_class = per_class

    def before_train(self, runner: Runner) -> None:
        """Check the model, and take the logger's interval when none is given."""
        model = unwrapped_model(runner)
        if not hasattr(model, 'distillation'):
            raise ValueError(
                '`TeacherShareHook` needs a model with a teacher, e.g. '
                f"type='mmdistill_ext.TeacherStudentDistiller'. Found {type(model).__name__}."
            )
        if self.interval is None:
            loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
            self.interval = loggers[0].interval if loggers else 50

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Publish when the logger is about to print."""
        end = self.end_of_epoch(runner.train_dataloader, batch_idx)
        if not (end or self.every_n_inner_iters(batch_idx, self.interval)):
            return
        distillation = unwrapped_model(runner).distillation
        for term in distillation.head_terms:
            records = getattr(term.loss, 'records', None)
            counts = None if records is None else records.pop_counts()
            if counts is None:
                continue
            all_reduce(counts)
            classes = term.pair.label_names(distillation.classes) if self.per_class else ()
            publish(runner.message_hub, shares(counts, term.name, classes))


def shares(counts: Tensor, name: str, classes: Sequence[str]) -> dict[str, float | None]:
    """Turn counts into named shares.

    Args:
        counts: ``(2, C)``: units, and units where the teacher wins, per label.
        name: Name of the loss.
        classes: ``C`` names; none for the overall share only.

    Returns:
        Scalar's name -> share in ``[0, 1]``, None where there are no units.
    """
    key = f'train/teacher_better/{name}'
    keys = [key, *(f'{key}/{c.replace("/", "_").replace(" ", "_")}' for c in classes)]
    table = torch.cat([counts.sum(1, keepdim=True), counts], dim=1)[:, : len(keys)].tolist()
    rows = zip(keys, *table, strict=True)
    return {key: won / units if units else None for key, units, won in rows}
