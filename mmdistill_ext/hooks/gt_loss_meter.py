"""Measures a student's GT loss on held-out batches without changing its training (FIT-6)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner, autocast
from torch import Tensor

from mmdistill_ext.distillers.distillation import Distillation, check_main_term
from mmdistill_ext.error_keys import errors_of_part
from mmdistill_ext.functional.add_up import add_up
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.label_scan import scan_labels
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.round_loader import RoundLoader, build_labelled_loader


class GTLossMeter:
    """Measures the GT loss of a student in eval mode, round after round over some data (FIT-1).

    Args:
        runner: The run.
        distillation: The student's, with the fit loss.
        cfg: Config of the loader.
        key: The config key to name in errors.
        batches: Batches per round and process, >= 1.
        check_labels: How many labels to check when the meter is built; 0 for none.

    Attributes:
        loader: Its sampler's ``position`` is the state of the meter.

    Raises:
        ValueError: The loader has no data, or its labels are missing or outside the classes.
    """

    def __init__(
        self,
        runner: Runner,
        distillation: Distillation,
        cfg: dict | None,
        key: str,
        batches: int,
        check_labels: int,
    ) -> None:
        self.term = check_main_term(distillation.main_term)
        pair = self.term.pair
        self.loader: RoundLoader = build_labelled_loader(
            cfg,
            batches,
            runner.seed,
            key,
            has_labels=pair.has_labels,
            measured='a GT loss',
            label_kinds=pair.label_kinds,
        )
        dataset = self.loader.dataset
        with isolated_rng():
            if check_labels and is_main_process():
                scan_labels(dataset, check_labels, pair.data_classes, pair.ignore_index, key)
            batch = self.loader.collate_fn([dataset[0]])
            with errors_of_part('student'):  # fails now if it ever does
                self._sum(runner, [batch])

    def measure(self, runner: Runner) -> list[float]:
        """Sums of the loss and of its weights over the next round's batches of all ranks."""
        sampler = self.loader.sampler
        with isolated_rng(runner.seed + sampler.position):
            sums = self._sum(runner, self.loader)
        sampler.position += sampler.size
        all_reduce(sums)
        return sums.tolist()

    def _sum(self, runner: Runner, batches: Iterable[dict]) -> Tensor:
        model, wrapper = unwrapped_model(runner), runner.optim_wrapper
        amp = isinstance(wrapper, AmpOptimWrapper)
        cast = dict(enabled=amp, dtype=wrapper.cast_dtype if amp else None)
        with eval_mode(model), torch.no_grad(), autocast(**cast):
            losses = (self.term.pair.gt_loss(model, batch, self.term.fused) for batch in batches)
            return add_up(losses)
