"""Measures the fitting error of a run with the fit loss."""

from __future__ import annotations

import logging
from pathlib import Path
from time import perf_counter

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdistill_ext.dataset_configs import find_pipeline, with_pipeline
from mmdistill_ext.distillers.distillation import Distillation, check_main_term
from mmdistill_ext.distillers.fit import Fit
from mmdistill_ext.hooks.common import publish, unwrapped_model
from mmdistill_ext.hooks.fit_state import FitState
from mmdistill_ext.hooks.gt_loss_meter import GTLossMeter
from mmdistill_ext.hooks.pictures import Pictures
from mmdistill_ext.registry import HOOKS
from mmdistill_ext.round_loader import batch_size, held_out_loader_cfg
from mmdistill_ext.visualization.curves import plot_fit


@HOOKS.register_module()
class FitHook(Hook):
    """Measures the GT losses whose difference is the fitting error x (FIT-2, FIT-6, FIT-7).

    Every ``interval`` iterations the student, in eval mode and without gradient, is compared with
    the labels of the next ``batches`` validation batches per process: the second GT loss. The first
    GT loss comes from the training steps themselves. Measuring does not change training: no buffer,
    random number or data order is touched.

    Logs ``fit/error`` (x), ``fit/weight`` (F(x)), ``fit/train_gt_loss``, ``fit/val_gt_loss``,
    ``fit/simple_share``, and ``fit/cost``, the share of the time since the start (or resumption)
    that measuring took; draws them in ``<work_dir>/<time>/vis_data/fit.png``. All state is in the
    checkpoint.

    Args:
        interval: Iterations between measurements (k).
        batches: Batches per measurement and process (n); of more than one image together.
        window: Length of the running means in iterations; ``interval`` when not given. From the
            first measurement on it should hold more than one training image.
        begin: Iterations at the start of the run that are left out; x is 0 until then. In a run
            from scratch the statistics of BatchNorm have to settle before eval mode means anything.
        dataloader: Where the second GT loss is measured; ``val_dataloader`` when not given, for
            detectors with the training's batch size. Its sampler is replaced by one that
            repeats the data in random permutations.
        measure_train: Measure the first GT loss in eval mode, on as many training images under the
            validation's pipeline, and use it instead of the training steps' own loss, which dropout
            and augmentation raise: they would hide overfitting. Logged as
            ``fit/train_gt_loss_eval``.
        check_labels: How many validation labels to look at before the start; 0 for none.

    Raises:
        ValueError: A value is out of range, there is no validation data or it has no labels, or
            the model has no fit loss.
    """

    priority = 'NORMAL'  # before LoggerHook and CheckpointHook
    distillation: Distillation
    fit: Fit

    def __init__(
        self,
        interval: int = 200,
        batches: int = 8,
        window: int | None = None,
        begin: int = 0,
        dataloader: dict | None = None,
        measure_train: bool = False,
        check_labels: int = 100,
    ) -> None:
        self._window_key = 'interval' if window is None else 'window'
        window = interval if window is None else window
        for name, value, least in (
            ('interval', interval, 1),
            ('batches', batches, 1),
            ('window', window, 1),
            ('begin', begin, 0),
            ('check_labels', check_labels, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f'`FitHook.{name}` should be an integer >= {least}. Found {value}.'
                )
        self.interval = interval
        self.batches = batches
        self.begin = begin
        self.dataloader = dataloader
        self.measure_train = measure_train
        self.check_labels = check_labels
        self.state = FitState(window)
        self.meters: dict[str, GTLossMeter] = {}
        self._positions: dict[str, int] = {}
        self._seconds = 0.0
        self._draws_next = False
        self.pictures = Pictures(type(self).__name__)

    def before_train(self, runner: Runner) -> None:
        """Build the loaders, try a sample of each, and restore the state of a resumed run."""
        distillation = getattr(unwrapped_model(runner), 'distillation', None)
        if distillation is None or distillation.fit is None:
            raise ValueError(
                '`FitHook` needs a model with the fit loss, e.g. model.fit='
                "dict(function=dict(type='ExponentialFit')). Found none."
            )
        self.distillation, self.fit = distillation, distillation.fit
        self.meters = self._build_meters(runner)
        self._check_samples(runner)
        for name, meter in self.meters.items():
            meter.loader.sampler.position = self._positions.get(name, 0)
        self.fit.has_hook = True
        self._apply()
        self._start = perf_counter()

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Draw the history of a checkpoint that is saved by now."""
        if self._draws_next:
            self._draw(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Measure every ``interval`` iterations, from ``begin`` on."""
        step, start = runner.iter + 1, perf_counter()
        if step <= self.begin:
            self.fit.pop_records()
            return
        if not self.every_n_train_iters(runner, self.interval):
            return
        self._take_records()
        for name, meter in self.meters.items():
            self.state.add_measured(name, step, meter.measure(runner))
        try:
            scalars = self.state.update()
        except ValueError as error:
            raise ValueError(f'FIT, iteration {step}: {error}') from error
        self._apply()
        scalars['weight'] = self.fit.weight
        self.state.history.append(dict(iter=step, **scalars))
        self._seconds += perf_counter() - start
        scalars['cost'] = self._seconds / (perf_counter() - self._start)
        publish(runner.message_hub, {f'train/fit/{name}': v for name, v in scalars.items()})

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the state in the checkpoint; its history is drawn when the checkpoint is saved."""
        self._take_records()
        positions = {name: meter.loader.sampler.position for name, meter in self.meters.items()}
        checkpoint['fit'] = dict(positions=positions, **self.state.state_dict())
        self._draws_next = True

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the state of a resumed run."""
        if not runner._resume:
            return
        if 'fit' not in checkpoint:
            print_log(
                'The checkpoint has no state of the fit loss: its means start anew.',
                logger='current',
                level=logging.WARNING,
            )
            return
        self._positions = checkpoint['fit']['positions']
        self.state.load_state_dict(checkpoint['fit'])

    def after_train(self, runner: Runner) -> None:
        """Log how long measuring took, and show the picture."""
        total = perf_counter() - self._start
        print_log(
            f'FIT: measuring took {self._seconds:.1f} s of {total:.1f} s '
            f'({self._seconds / total:.1%} of the run).',
            logger='current',
        )
        self._draw(runner, show=True)

    def _build_meters(self, runner: Runner) -> dict[str, GTLossMeter]:
        detection = check_main_term(self.distillation.main_term).pair.is_detection
        cfg, key = held_out_loader_cfg(
            runner, self.dataloader, 'FitHook', is_detection=detection, labels_as_image=detection
        )
        more = self.batches, self.check_labels
        meters = {'val': GTLossMeter(runner, self.distillation, cfg, key, *more)}
        if self.measure_train and cfg is not None:
            train = runner.cfg.train_dataloader.dataset
            cfg = {**cfg, 'dataset': with_pipeline(train, find_pipeline(cfg['dataset']))}
            key = 'train_dataloader'
            meters['train'] = GTLossMeter(runner, self.distillation, cfg, key, *more)
        return meters

    def _check_samples(self, runner: Runner) -> None:
        """Refuse a mean over a single image (FIT-2).

        Raises:
            ValueError: M or N is below 2.
        """
        for name, meter in self.meters.items():
            count, data = meter.loader.sampler.size, len(meter.loader.dataset)
            if min(count, data) < 2:
                raise ValueError(
                    '`FitHook.batches` should be so many that a GT loss is the mean over more than '
                    f'one image (FIT-2). Found batches={self.batches}, {count} images from all '
                    f"processes for the '{name}' data, of which there are {data}."
                )
        first = (self.begin // self.interval + 1) * self.interval
        steps = min(self.state.window, first - self.begin)
        images = batch_size(runner.train_dataloader) * get_world_size()
        if 'train' not in self.meters and steps * images < 2:
            raise ValueError(
                f'`FitHook.{self._window_key}` should be so long that the first GT loss is a mean '
                f'over more than one training image (FIT-2). Found {steps} iteration of {images} '
                f'image before the first measurement, at iteration {first}.'
            )

    def _take_records(self) -> None:
        records = self.fit.pop_records()
        if records:
            self.state.add_steps(torch.stack(records).tolist())

    def _apply(self) -> None:
        if self.state.error is not None:
            self.fit.error = self.state.error

    def _draw(self, runner: Runner, show: bool = False) -> None:
        self._draws_next = False
        if not (self.state.history and is_main_process()):
            return
        with self.pictures.guarded():
            path = Path(runner.log_dir, 'vis_data', 'fit.png')
            image = plot_fit(self.state.history, path)
            if show:
                runner.visualizer.add_image('fit', image, runner.iter)
