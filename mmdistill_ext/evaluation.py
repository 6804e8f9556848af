"""Evaluation of several networks and their ensemble in one validation (COL-7)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.evaluator import Evaluator
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement

from mmdistill_ext.losses.collaboration_loss import ENSEMBLE
from mmdistill_ext.registry import EVALUATOR

PATHS = ('output_dir', 'outfile_prefix', 'out_file_path')
"""Arguments of metrics that say where to write predictions; some metrics read them again later."""


@EVALUATOR.register_module()
class NetworksEvaluator(Evaluator):
    """The metrics of an ordinary evaluator, for each network and for the ensemble (COL-7).

    ``mIoU`` becomes ``a/mIoU``, ``b/mIoU`` and ``ensemble/mIoU``, which ``save_best`` of a
    ``CheckpointHook`` can name. What metrics write goes to a folder for each network.

    Args:
        metrics: What ``val_evaluator`` was: a metric's config, or several.

    Example:
        >>> val_evaluator = dict(  # in a config
        ...     _delete_=True,
        ...     type='mmdistill_ext.NetworksEvaluator',
        ...     metrics=dict(type='IoUMetric', iou_metrics=['mIoU']),
        ... )
    """

    def __init__(self, metrics: dict | Sequence) -> None:
        self._cfg = deepcopy(metrics)
        super().__init__(_of_network(metrics, ENSEMBLE))
        self.networks: dict[str, Evaluator] = {}

    def process(
        self, data_samples: Sequence[BaseDataElement], data_batch: Any | None = None
    ) -> None:
        """Hand the data samples of each network, and of the ensemble, to the metrics.

        Raises:
            ValueError: The predictions are not those of several networks.
        """
        names = list(getattr(data_samples[0], 'networks', ()))
        if not names:
            raise ValueError(
                '`NetworksEvaluator` needs the predictions of several networks, as '
                "type='mmdistill_ext.CollaborativeDistiller' gives them. Found those of one."
            )
        for name in names:
            self._add_network(name)
            of_network = [sample.networks[name] for sample in data_samples]
            self.networks[name].process(of_network, data_batch)
        super().process(data_samples, data_batch)

    def evaluate(self, size: int) -> dict:
        """Evaluate each network and the ensemble (COL-7).

        Args:
            size: Length of the validation data set.

        Returns:
            ``<network>/<metric>`` and ``ensemble/<metric>`` -> value.
        """
        for name in chain.from_iterable(all_gather_object(list(self.networks))):
            self._add_network(name)  # also in a process without any image: the others wait for it
        metrics = {}
        for name, evaluator in self.networks.items():
            print_log(f'Network {name}:', logger='current')
            metrics.update(_named(name, evaluator.evaluate(size)))
        print_log('Ensemble:', logger='current')
        metrics.update(_named(ENSEMBLE, super().evaluate(size)))
        return metrics

    def _add_network(self, name: str) -> None:
        if name not in self.networks:
            self.networks[name] = Evaluator(_of_network(self._cfg, name))
            self.networks[name].dataset_meta = self.dataset_meta


def _of_network(metrics: Any, name: str) -> Any:
    """Copy metrics' configs so that files of several networks do not mix."""
    if isinstance(metrics, (list, tuple)):
        return [_of_network(metric, name) for metric in metrics]
    metrics = deepcopy(metrics)
    for key in PATHS:
        if isinstance(metrics, dict) and metrics.get(key):
            folder, file = os.path.split(metrics[key].rstrip('/'))
            parts = (file, name) if key == 'output_dir' else (name, file)
            metrics[key] = os.path.join(folder, *parts)
    return metrics


def _named(name: str, metrics: dict) -> dict:
    return {f'{name}/{metric}': value for metric, value in metrics.items()}
