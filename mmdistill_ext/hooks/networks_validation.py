"""What a validation tells of several networks: scores, and how their errors correlate (COL-3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmengine.dist import all_reduce
from mmengine.runner import Runner
from torch import Tensor

from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.error_keys import errors_of_modules
from mmdistill_ext.functional.add_up import add_up
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.round_loader import RoundLoader, build_labelled_loader, held_out_loader_cfg


@dataclass(frozen=True)
class NetworksValidation:
    """What a policy of the second prediction may ask for after a validation.

    Args:
        names: The networks' names.
        metrics: ``<network>/<metric>`` -> value.
        measure_errors: Gives ``(N, N)``, see :meth:`HeldOutErrors.measure`.
    """

    names: Sequence[str]
    metrics: Mapping[str, float]
    measure_errors: Callable[[], Tensor]

    def score(self, name: str, metric: str) -> float | None:
        """The metric of a network or of the ensemble; None if it is missing or not finite."""
        value = self.metrics.get(f'{name}/{metric}')
        return float(value) if value is not None and math.isfinite(value) else None

    def scores(self, metric: str) -> list[float | None]:
        """The metric of each network; None where it is missing or not finite."""
        return [self.score(name, metric) for name in self.names]

    def error_correlation(self) -> Tensor:
        """``(N, N)``, sums of the products of the networks' errors on held-out images."""
        return self.measure_errors()


class HeldOutErrors:
    """Measures how the networks' errors on held-out images correlate (COL-3, KDCL-General).

    Args:
        runner: The run.
        model: The networks.
        dataloader: Config of the loader; ``val_dataloader`` when not given.
        batches: Batches per measurement and process.

    Raises:
        ValueError: The loader has no data or no labels.
    """

    def __init__(
        self, runner: Runner, model: CollaborativeDistiller, dataloader: dict | None, batches: int
    ) -> None:
        self.model = model
        cfg, key = held_out_loader_cfg(
            runner,
            dataloader,
            'CollaborationHook',
            is_detection=model.joint.is_detection,
            labels_as_image=True,
        )
        self.loader: RoundLoader = build_labelled_loader(
            cfg, batches, runner.seed, key, has_labels=model.has_labels, measured='errors'
        )
        networks = {f'students.{name}': network for name, network in model.students.items()}
        # Fails now rather than at the first validation.
        with isolated_rng(), eval_mode(model), errors_of_modules(networks):
            model.error_correlation(self.loader.collate_fn([self.loader.dataset[0]]))

    def measure(self, runner: Runner) -> Tensor:
        """Sum of products of errors over the next round's batches of all ranks, ``(N, N)``."""
        sampler = self.loader.sampler
        sampler.position = runner.iter * sampler.size  # the same after a resumption
        with isolated_rng(runner.seed), eval_mode(self.model):
            total = add_up(self.model.error_correlation(batch) for batch in self.loader)
        all_reduce(total)
        return total
