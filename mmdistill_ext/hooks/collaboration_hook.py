"""What collaborative training takes from the validation, and says about it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdistill_ext.checkpoint import write_atomic
from mmdistill_ext.distillers.collaborative import ENSEMBLE, CollaborativeDistiller
from mmdistill_ext.evaluation import NetworksEvaluator
from mmdistill_ext.export import SCORES
from mmdistill_ext.hooks.common import publish, unwrapped_model
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.registry import HOOKS
from mmdistill_ext.round_loader import build_round_loader, labels_first
from mmdistill_ext.transforms import MakeViews
from mmdistill_ext.visualization.curves import plot_networks

METRICS = ('mIoU', 'coco/bbox_mAP', 'pascal_voc/mAP')
"""What networks are compared by when no metric is named: the first of these there is."""
ILL_CONDITIONED = 1e6
"""Condition number of a matrix of errors that is worth a warning."""


@HOOKS.register_module()
class CollaborationHook(Hook):
    """Gives the networks their weights in the second prediction, and marks the best (COL-3, COL-7).

    After every validation, ``ValidationWeighted`` takes its weights from the metrics and
    ``General`` from the errors on held-out images, of all processes. The model gets them when the
    validation is over: a checkpoint that is written in it holds the weights that were validated. A
    resumed run that stands at a validation repeats it first. Logs ``val/weight/<network>``, writes
    the scores, the new weights and the best network to ``networks.json`` in the run's folder, where
    ``tools/export_student.py --network best`` reads, and draws them
    (``<work_dir>/<time>/vis_data/networks.png``).

    Args:
        metric: What networks are compared by, as the evaluator names it; by default that of
            ``ValidationWeighted``, else mIoU or mAP.
        batches: ``General``: held-out batches per measurement and process.
        dataloader: ``General``: where the errors are measured; ``val_dataloader`` when not given,
            for detectors with the training's batch size. Its sampler is replaced by one that goes
            round in random permutations.

    Raises:
        ValueError: The model is not collaborative, there is no validation to take weights from,
            the pipeline's views are of other networks, or the metric is none of the validation's.
    """

    priority = 'NORMAL'  # before LoggerHook and CheckpointHook

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
        self._loader = None
        self._weights = None  # found, and not the model's yet
        self._repeats = False

    def before_train(self, runner: Runner) -> None:
        """Check the run."""
        self.model = unwrapped_model(runner)
        if not isinstance(self.model, CollaborativeDistiller):
            raise ValueError(
                "`CollaborationHook` needs type='mmdistill_ext.CollaborativeDistiller'. Found "
                f'{type(self.model).__name__}.'
            )
        check_views(runner.train_dataloader.dataset, self.model.names)
        if self.model.second.weights_from:
            self._check_validation(runner)
        self._check_names(runner)
        if self.model.second.weights_from:
            self.model.has_hook = True
            if self.model.second.weights_from == 'errors':
                self._loader = self._build_loader(runner)
            self._repeats = _stands_at_validation(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Repeat the validation that a resumed run stands at; every hook is ready for it by now."""
        if self._repeats:
            self._repeats = False
            print_log('Repeats the validation, for the weights of the networks.', 'current')
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Find the weights, log them, and mark the best network."""
        if not isinstance(getattr(self, 'model', None), CollaborativeDistiller):
            return  # validated without training
        metrics, names = metrics or {}, self.model.names
        metric = self._metric(metrics)
        scores = {name: _finite(metrics.get(f'{name}/{metric}')) for name in (*names, ENSEMBLE)}
        self._weights = self._find_weights(runner, metrics)
        weights = self.model.weights if self._weights is None else self._weights
        found = dict(zip(names, weights.tolist(), strict=True))
        if self.model.second.weights_from:
            publish(runner.message_hub, {f'val/weight/{name}': w for name, w in found.items()})
        own = {name: scores[name] for name in names if scores[name] is not None}
        best = max(own, key=own.get) if own else None
        if best is not None:
            others = ', '.join(f'{k} {v:.4g}' for k, v in scores.items() if v is not None)
            print_log(f'Best network: {best} ({metric}: {others}).', 'current')
        if is_main_process():
            entry = dict(metric=metric, scores=scores, weights=found, best=best)
            known = record(Path(runner.work_dir, SCORES), runner.iter, entry)
            image = plot_networks(known, Path(runner.log_dir, 'vis_data', 'networks.png'))
            runner.visualizer.add_image('networks', image, runner.iter)

    def after_val(self, runner: Runner) -> None:
        """Give the model its weights, and its running mean of an ``EMAHook`` the same."""
        if self._weights is None:
            return
        means = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
        for model in (self.model, *(mean.module for mean in means if mean is not None)):
            model.weights.copy_(self._weights)
        self._weights = None

    def _wanted(self) -> dict[str, str]:
        """Config key -> the metric that it names; what networks are compared by is first."""
        named = {
            'CollaborationHook.metric': self.metric,
            'second.metric': getattr(self.model.second, 'metric', None),
        }
        return {key: metric for key, metric in named.items() if metric is not None}

    def _check_names(self, runner: Runner) -> None:
        """Refuse what no metric of the evaluator can be called; the rest its results show."""
        metrics = getattr(getattr(runner.val_loop, 'evaluator', None), 'metrics', ())
        prefixes = [metric.prefix for metric in metrics]
        networks = (*self.model.names, ENSEMBLE)
        for key, name in self._wanted().items():
            own = name.partition('/')[0] in networks
            possible = [name.startswith(f'{prefix}/') if prefix else not own for prefix in prefixes]
            if prefixes and not any(possible):
                raise ValueError(
                    f"`{key}` should be a metric's name with its prefix and without a network's. "
                    f"Found '{name}', prefixes are {prefixes}."
                )

    def _metric(self, metrics: dict) -> str:
        parts = [name.partition('/') for name in metrics]
        known = {rest for name, _, rest in parts if name in (*self.model.names, ENSEMBLE)}
        for key, name in self._wanted().items():
            if metrics and name not in known:
                raise ValueError(
                    f"`{key}` should be a metric of each network's validation. Found '{name}', "
                    f'there are {sorted(known) or "none (see NetworksEvaluator)"}.'
                )
        default = next((name for name in METRICS if name in known), min(known, default='none'))
        return next(iter(self._wanted().values()), default)

    def _find_weights(self, runner: Runner, metrics: dict) -> Tensor | None:
        second = self.model.second
        if second.weights_from == 'metric':
            scores = [_finite(metrics.get(f'{n}/{second.metric}')) for n in self.model.names]
            if None in scores:
                _warn(f'Not every network has a {second.metric} yet: the weights stay.')
                return None
            return second.weights(scores)
        if second.weights_from == 'errors':
            correlation = self._measure(runner)
            if not torch.isfinite(correlation).all() or not correlation.diagonal().mean() > 0:
                _warn('The errors on held-out images are not finite, or none: the weights stay.')
                return None
            weights, condition = second.weights(correlation.cpu())
            if condition > ILL_CONDITIONED:
                _warn(
                    f'The networks err nearly alike (condition number {condition:.1e}): '
                    f'second.ridge={second.ridge} decides.'
                )
            return weights
        return None

    def _measure(self, runner: Runner) -> Tensor:
        """Sum of products of errors over the next round's batches of all ranks."""
        sampler = self._loader.sampler
        sampler.position = runner.iter * sampler.size  # the same after a resumption
        with isolated_rng(runner.seed), eval_mode(self.model):
            total = sum(self.model.error_correlation(batch) for batch in self._loader)
        all_reduce(total)
        return total

    def _check_validation(self, runner: Runner) -> None:
        kind = type(self.model.second).__name__
        if runner.val_loop is None:
            raise ValueError(
                f'`second`={kind} takes its weights from the validation: it needs '
                '`val_dataloader`, `val_evaluator` and `val_cfg`. Found none.'
            )
        evaluator = runner.val_loop.evaluator
        if self.model.second.weights_from == 'metric' and not isinstance(
            evaluator, NetworksEvaluator
        ):
            raise ValueError(
                f"`second`={kind} needs val_evaluator=dict(type='mmdistill_ext.NetworksEvaluator', "
                f'metrics=...), which scores every network. Found {type(evaluator).__name__}.'
            )

    def _build_loader(self, runner: Runner):
        key = 'val_dataloader' if self.dataloader is None else 'CollaborationHook.dataloader'
        cfg = runner.cfg.get(key) if self.dataloader is None else self.dataloader
        if isinstance(cfg, dict) and 'dataset' in cfg:
            cfg = {**cfg, 'dataset': labels_first(cfg['dataset'])}
            if self.dataloader is None and self.model.joint.average == 'positive':
                cfg['batch_size'] = runner.cfg.train_dataloader.batch_size
        loader = build_round_loader(cfg, self.batches, runner.seed, key)
        with isolated_rng(), eval_mode(self.model):
            first = loader.dataset[0]
            if not _is_labelled(first['data_samples']):
                raise ValueError(
                    f'`{key}.dataset` should give labels to measure errors on: its pipeline should '
                    'load annotations. Found a sample without.'
                )
            self.model.error_correlation(loader.collate_fn([first]))
        return loader


def check_views(dataset, names: list[str]) -> None:
    """Refuse a pipeline whose views are not those of the networks, in their order."""
    pipeline = getattr(dataset, 'pipeline', None) or ()  # a wrapper that mixes images has a list
    for transform in getattr(pipeline, 'transforms', pipeline):
        if isinstance(transform, MakeViews) and transform.names != names:
            raise ValueError(
                f'`MakeViews.views` should be those of `students`, in order: {names}. Found '
                f'{transform.names}.'
            )
    for part in (*getattr(dataset, 'datasets', ()), getattr(dataset, 'dataset', None)):
        if part is not None:
            check_views(part, names)


def record(path: Path, iteration: int, entry: dict) -> dict[int, dict]:
    """Add a validation to the file, in place of earlier ones of this iteration or a later.

    Returns:
        Iteration -> all that the file holds.
    """
    known = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    known = {int(key): value for key, value in known.items() if int(key) < iteration}
    known[iteration] = entry
    text = json.dumps(known, indent=2)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))
    return known


def _is_labelled(sample: BaseDataElement) -> bool:
    return 'gt_sem_seg' in sample or 'bboxes' in sample.get('gt_instances', ())


def _stands_at_validation(runner: Runner) -> bool:
    loop = runner.train_loop
    loop._decide_current_val_interval()  # `dynamic_intervals`; else not before the next iteration
    done = runner.epoch if isinstance(loop, EpochBasedTrainLoop) else runner.iter
    return done > 0 and done >= loop.val_begin and done % loop.val_interval == 0


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
