"""What collaborative training takes from the validation, and reports about it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from mmdistill_ext.dataset_configs import walk_datasets, wrapped_datasets
from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.evaluation import NetworksEvaluator
from mmdistill_ext.functional.checks import given
from mmdistill_ext.hooks.common import publish, unwrapped_model
from mmdistill_ext.hooks.compared_metric import ComparedMetric
from mmdistill_ext.hooks.metric_names import check_monitored, names_of_evaluator
from mmdistill_ext.hooks.networks_validation import HeldOutErrors, NetworksValidation
from mmdistill_ext.hooks.pictures import Pictures
from mmdistill_ext.losses.collaboration_loss import ENSEMBLE
from mmdistill_ext.network_scores import record_scores
from mmdistill_ext.package_types import registered_name
from mmdistill_ext.registry import HOOKS, TRANSFORMS
from mmdistill_ext.transforms import MakeViews
from mmdistill_ext.visualization.curves import plot_networks


@HOOKS.register_module()
class CollaborationHook(Hook):
    """Gives the networks their weights in the second prediction, and marks the best (COL-3, COL-7).

    After every validation, ``ValidationWeighted`` takes its weights from the metrics and
    ``General`` from the errors of all processes on held-out images. The model gets them when the
    validation is over: a checkpoint saved during validation holds the weights that were validated.
    A run resumed from such a checkpoint validates again first. Logs ``val/weight/<network>``,
    writes the scores, the new weights and the best network to ``networks.json`` in the run's
    folder, where ``tools/export_student.py --network best`` reads, and draws them
    (``<work_dir>/<time>/vis_data/networks.png``).

    Args:
        metric: What networks are compared by, as the evaluator names it; by default that of
            ``ValidationWeighted``, else mIoU or mAP.
        batches: ``General``: held-out batches per measurement and process.
        dataloader: ``General``: where the errors are measured; ``val_dataloader`` when not given,
            for detectors with the training's batch size. Its sampler is replaced by one that
            repeats the data in random permutations.

    Raises:
        ValueError: The model is not collaborative, there is no validation to take weights from,
            the pipeline's views are of other networks, or the metric is none of the validation's.
    """

    priority = 'NORMAL'  # before LoggerHook and CheckpointHook
    model: CollaborativeDistiller

    def __init__(
        self, metric: str | None = None, batches: int = 8, dataloader: dict | None = None
    ) -> None:
        if not isinstance(batches, int) or batches < 1:
            raise ValueError(
                f'`CollaborationHook.batches` should be an integer >= 1. Found {batches!r}.'
            )
        self.metric = metric
        self.batches = batches
        self.dataloader = dataloader
        self._errors: HeldOutErrors | None = None
        self._weights: Tensor | None = None  # from a validation that is not over
        self._repeats = False
        self._history: Mapping[int, Mapping] | None = None  # that is not drawn yet
        self.pictures = Pictures(type(self).__name__)

    def before_train(self, runner: Runner) -> None:
        """Check the run."""
        self.model = unwrapped_model(runner)
        if not isinstance(self.model, CollaborativeDistiller):
            raise ValueError(
                "`CollaborationHook` needs type='mmdistill_ext.CollaborativeDistiller'. Found "
                f'{type(self.model).__name__}.'
            )
        switches = [getattr(hook, 'switch_pipeline', None) for hook in runner.hooks]
        switched = [pipeline for pipeline in switches if pipeline is not None]
        check_views(runner.train_dataloader.dataset, self.model.names, switched)
        if any(type(hook).__name__ == 'YOLOXModeSwitchHook' for hook in runner.hooks):
            raise ValueError(
                '`custom_hooks` should have no YOLOXModeSwitchHook: it switches `model.bbox_head`, '
                'and the heads of `students` are others. Take PipelineSwitchHook. Found one.'
            )
        if self.model.second.weights_from:
            self._check_validation(runner)
        self.compared = self._build_compared_metric(runner)
        if self.model.second.weights_from:
            self.model.has_hook = True
            if self.model.second.weights_from == 'errors':
                self._errors = HeldOutErrors(runner, self.model, self.dataloader, self.batches)
            self._repeats = _stands_at_validation(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Validate first if the checkpoint of a resumed run was saved during a validation."""
        if self._repeats:
            self._repeats = False
            print_log('Repeats the validation, for the weights of the networks.', 'current')
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Find the weights, log them, and mark the best network."""
        if not isinstance(getattr(self, 'model', None), CollaborativeDistiller):
            return  # validated without training
        names = self.model.names
        validation = NetworksValidation(
            names, metrics or {}, lambda: given(self._errors, 'HeldOutErrors').measure(runner)
        )
        metric = self.compared.choose(validation.metrics)
        scores = {name: validation.score(name, metric) for name in (*names, ENSEMBLE)}
        self._weights = self.model.second.find_weights(validation)
        weights = self.model.weights if self._weights is None else self._weights
        named = dict(zip(names, weights.tolist(), strict=True))
        if self.model.second.weights_from:
            publish(runner.message_hub, {f'val/weight/{name}': w for name, w in named.items()})
        entry = dict(metric=metric, scores=scores, weights=named, best=_best(scores, names))
        if entry['best'] is not None:
            others = ', '.join(f'{k} {v:.4g}' for k, v in scores.items() if v is not None)
            print_log(f'Best network: {entry["best"]} ({metric}: {others}).', 'current')
        if is_main_process():
            self._history = record_scores(runner.work_dir, runner.iter, entry)

    def after_val(self, runner: Runner) -> None:
        """Give the found weights to the model, and to the averaged copy of an ``EMAHook``; draw."""
        self._draw(runner)
        if self._weights is None:
            return
        means = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
        for model in (self.model, *(mean.module for mean in means if mean is not None)):
            model.weights.copy_(self._weights)
        self._weights = None

    def _draw(self, runner: Runner) -> None:
        """Draw the scores of all validations, now that the best checkpoint is saved."""
        history, self._history = self._history, None
        if history is None:
            return
        with self.pictures.guarded():
            image = plot_networks(history, Path(runner.log_dir, 'vis_data', 'networks.png'))
            runner.visualizer.add_image('networks', image, runner.iter)

    def _build_compared_metric(self, runner: Runner) -> ComparedMetric:
        candidates = {
            'CollaborationHook.metric': self.metric,
            'second.metric': getattr(self.model.second, 'metric', None),
        }
        named = {key: metric for key, metric in candidates.items() if metric is not None}
        compared = ComparedMetric(named, (*self.model.names, ENSEMBLE))
        evaluator = getattr(runner.val_loop, 'evaluator', None)
        metrics = getattr(evaluator, 'metrics', ())
        compared.check_prefixes([metric.prefix for metric in metrics])
        compared.check_names(names_of_evaluator(evaluator))
        check_monitored(runner, self.model.names)
        return compared

    def _check_validation(self, runner: Runner) -> None:
        second = self.model.second
        if runner.val_loop is None:
            raise ValueError(
                f'`second`={type(second).__name__} takes its weights from the validation: it needs '
                '`val_dataloader`, `val_evaluator` and `val_cfg`. Found none.'
            )
        evaluator = runner.val_loop.evaluator
        if second.weights_from == 'metric' and not isinstance(evaluator, NetworksEvaluator):
            raise ValueError(
                f'`second`={type(second).__name__} needs '
                "val_evaluator=dict(type='mmdistill_ext.NetworksEvaluator', metrics=...), which "
                f'scores every network. Found {type(evaluator).__name__}.'
            )


def check_views(dataset: Any, names: Sequence[str], switched: Sequence[Any] = ()) -> None:
    """Refuse a pipeline whose views are not those of the networks (COL-6).

    Args:
        dataset: The training data.
        names: The networks.
        switched: Pipelines that come in its place later, as configs or built.
    """
    found = [_views_of(getattr(part, 'pipeline', None) or ()) for part in walk_datasets(dataset)]
    later = [_views_of(pipeline) for pipeline in switched]
    for views in (*found, *later):
        if views is not None and set(views) != set(names):
            raise ValueError(
                f'`MakeViews.views` should be those of `students`: {sorted(names)}. Found '
                f'{sorted(views)}.'
            )
    if _makes_views(dataset) and not all(later):
        print_log(
            '`PipelineSwitchHook.switch_pipeline` has no MakeViews: from then on all networks see '
            'the same image.',
            'current',
            logging.WARNING,
        )


def _makes_views(dataset: Any) -> bool:
    """Whether all samples of a data set, inside any wrappers, have views; refuses a mixture."""
    if _views_of(getattr(dataset, 'pipeline', None) or ()):
        return True
    parts = {_makes_views(part) for part in wrapped_datasets(dataset)}
    if len(parts) == 2:
        raise ValueError(
            '`train_dataloader.dataset` should have MakeViews in the pipelines of all its data '
            'sets or of none, since a batch has views for all its images or for none. Found both.'
        )
    return parts == {True}


def _views_of(pipeline: Any) -> list[str] | None:
    """Names of the views that a pipeline makes, built or a config; None without views."""
    for transform in getattr(pipeline, 'transforms', pipeline):  # data sets that mix have a list
        if isinstance(transform, MakeViews):
            return transform.names
        kind = transform.get('type') if isinstance(transform, Mapping) else None
        if registered_name(kind, TRANSFORMS) == MakeViews.__name__:
            return list(transform['views'])
    return None


def _best(scores: Mapping[str, float | None], names: list[str]) -> str | None:
    """The network with the largest score, if any has one."""
    known = {name: score for name in names if (score := scores[name]) is not None}
    return max(known, key=known.__getitem__) if known else None


def _stands_at_validation(runner: Runner) -> bool:
    """Whether the checkpoint that a run is resumed from was saved during a validation."""
    loop = runner.train_loop
    loop._decide_current_val_interval()  # `dynamic_intervals`; else not before the next iteration
    done = runner.epoch if isinstance(loop, EpochBasedTrainLoop) else runner.iter
    return done > 0 and done >= loop.val_begin and done % loop.val_interval == 0
