"""Several networks that teach each other, without a teacher (COL)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, ModuleDict
from torch import Tensor, nn

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.recompute import network_loss, recomputed_loss
from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.evaluation import ENSEMBLE
from mmdistill_ext.functional import (
    BlockReader,
    Labels,
    Side,
    collaborate,
    networks_correlation,
)
from mmdistill_ext.functional.checks import check_factor, check_labels, check_positive
from mmdistill_ext.losses.averages import scale_of
from mmdistill_ext.policies.second_predictions import Kind
from mmdistill_ext.preprocessing.network_inputs import NetworkInputs
from mmdistill_ext.registry import MODELS, SECOND_PREDICTIONS
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.joint import JointBoxes, JointUnits
from mmdistill_ext.units.joint_pairing import pair_networks

RESERVED = ('best', 'type', 'constructor', 'optimizer', 'paramwise_cfg')
"""What a network cannot be called, because configs and options mean something else by it."""


@MODELS.register_module()
class CollaborativeDistiller(BaseModel):
    """Trains N >= 2 networks together on one task (COL-1 to COL-8; KDCL, CVPR 2020).

    Each has its own loss (COL-2). Their logits form a second prediction per unit (COL-3), whose
    loss trains all of them, and each is pulled to it, detached, by a KL divergence (COL-4, COL-5).
    While it predicts, each data sample is the ensemble's, the weighted mean of the networks'
    logits (of detectors, NMS over all boxes, scores by weight), and ``sample.networks`` holds
    every network's own.

    The log has ``<name>/...`` for each network's own losses, ``<name>/loss_kl``, and
    ``ensemble/loss``.

    Args:
        students: Name -> network: a model dict, a config path, or ``'mmseg::pspnet/...py'``.
        second: Config of the second prediction: ``MinLoss``, ``Linear``, ``MinLogit``,
            ``ValidationWeighted`` or ``General``.
        kl: ``dict(weight=1.0, temperature=1.0, begin=0, warmup=0, stop=None)`` of the pull.
        second_weight: Of the second loss, >= 0.
        box: Detectors: ``dict(weight=1.0, distance='iou'|'l1')`` to make a second prediction of the
            boxes too (see
            :class:`~mmdistill_ext.losses.boxes.joint_box_term.JointBoxTerm`); logged as
            ``ensemble/loss_box`` and ``<name>/loss_kl_box``.
        sequential_backward: Free each network's activations after its forward and form them again
            when its backward pass comes (a second forward), so that one network's are in memory at
            a time. Gradients are the same.
        data_preprocessor: For networks that name none; the runner hands it over when the config
            has one beside the model.

    Attributes:
        weights: ``(N,)`` buffer of the networks' weights in the ensemble; those of
            ``ValidationWeighted`` and ``General`` come from the validation, others are equal.

    Raises:
        ValueError: There are fewer than two networks, a name is taken, a value is impossible, or
            the networks cannot be paired; the message names the key.
        FileNotFoundError: A config does not exist.
    """

    weights: Tensor

    def __init__(
        self,
        students: dict,
        second: dict,
        kl: dict | None = None,
        second_weight: float = 1.0,
        box: dict | None = None,
        sequential_backward: bool = False,
        data_preprocessor: dict | None = None,
    ) -> None:
        _check_names(students)
        configs = {}
        for name, spec in students.items():
            configs[name] = resolve_model_cfg(spec, f'students.{name}')
            if data_preprocessor is not None:
                configs[name].setdefault('data_preprocessor', data_preprocessor)
        networks = {name: build_model(cfg, f'students.{name}') for name, cfg in configs.items()}
        preprocessors = {name: cfg.get('data_preprocessor') for name, cfg in configs.items()}
        super().__init__(NetworkInputs(networks, preprocessors))
        self.students = ModuleDict(networks)  # mmengine's, which hands on `init_weights`
        self.register_buffer('weights', torch.full((len(networks),), 1 / len(networks)))
        self.joint = pair_networks(networks)
        kinds = ('bce', 'bce') if self.joint.sigmoid else ('ce', 'kl')
        self.difference, self.distance = kinds
        self.kind = Kind(self.difference, self.joint.ignore_index, self.joint.background)
        try:
            self.second = SECOND_PREDICTIONS.build({'_scope_': SECOND_PREDICTIONS.scope, **second})
            self.second.check(self.joint.sigmoid)
        except (TypeError, KeyError) as error:
            raise ValueError(f'`second`: {error}') from error
        if not isinstance(kl, dict | None):
            raise ValueError(f'`kl` should be a dict such as dict(weight=1.0). Found {kl!r}.')
        kl = dict(kl or {})
        self.temperature = kl.pop('temperature', 1.0)
        check_positive('kl.temperature', self.temperature)
        try:
            self.schedule = Schedule(**kl, key='kl')
        except TypeError as error:
            raise ValueError(f'`kl`: {error}') from error
        check_factor('second_weight', second_weight)
        self.second_weight = second_weight
        self.box = self._build_box(box)
        self.sequential_backward = sequential_backward
        self._labels_checked = False
        self.has_hook = False  # a hook takes the weights from the validation

    def _build_box(self, box: dict | None) -> nn.Module | None:
        if box is None:
            return None
        if self.joint.average != 'positive':
            raise ValueError(f'`box` is for detectors, segmenters have none. Found {box!r}.')
        from mmdistill_ext.losses.boxes.joint_box_term import JointBoxTerm

        try:
            return JointBoxTerm(**box)
        except TypeError as error:
            raise ValueError(f'`box`: {error}') from error

    @property
    def names(self) -> list[str]:
        """The networks' names."""
        return list(self.students)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list] | None = None,
        mode: str = 'tensor',
    ) -> dict | list:
        """As any model of the framework; ``inputs`` and ``data_samples`` by network.

        Args:
            inputs: Name -> batch ``(B, 3, H, W)``, preprocessed for the network.
            data_samples: Name -> the batch's data samples.
            mode: ``'loss'``, ``'predict'`` or ``'tensor'``.

        Returns:
            Named scalars, the ensemble's data samples, or name -> the network's output.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.joint.predict(self.students, inputs, data_samples, self.weights)
        samples = data_samples or {}
        return {
            name: network(inputs[name], samples.get(name), mode=mode)
            for name, network in self.students.items()
        }

    def loss(self, inputs: Mapping[str, Tensor], data_samples: Mapping[str, list]) -> dict:
        """Losses of all networks and of what they do together.

        Raises:
            ValueError: A label is outside of the classes (the first batch is looked at), or the
                weights should come from the validation and no hook brings them.
        """
        if self.second.weights_from and not self.has_hook:
            raise ValueError(
                f'`second`={type(self.second).__name__} takes its weights from the validation: it '
                "needs dict(type='mmdistill_ext.CollaborationHook') in `custom_hooks`. Found none."
            )
        if not self._labels_checked:
            for sample in data_samples[self.names[0]]:
                labels = self.joint.labels_of(sample)
                check_labels(labels, self.joint.num_classes, self.joint.ignore_index)
            self._labels_checked = True
        losses, taps = {}, {}
        for name, network in self.students.items():
            arguments = (network, inputs[name], data_samples[name])
            with Taps(network, {path: path for path in self.joint.taps(name)}) as taps[name]:
                run = recomputed_loss if self.sequential_backward else network_loss
                own = run(*arguments)
            for key, value in own.items():
                losses[f'{name}/{key.removeprefix(self.joint.prefix)}'] = value
        weight = self.schedule.at(MessageHub.get_current_instance().get_info('iter', 0))
        if weight or self.second_weight:
            units = self.joint(taps, data_samples, boxes=self.box is not None)
            losses.update(self._together(units, weight))
        for found in taps.values():
            found.clear()
        return losses

    def _together(self, units: JointUnits, weight: float) -> dict[str, Tensor]:
        result = collaborate(
            self._reader(units),
            self._combine,
            weigh_image=self._weigh_image if self.second.per == 'image' else None,
            difference=self.difference,
            distance=self.distance,
            temperature=self.temperature,
            second=self.second_weight > 0,
            pull=weight > 0,
        )
        counts = result.counts
        if self.joint.average == 'positive':
            counts = counts[: self.joint.num_classes]
        total = counts.sum().to(result.second_sum)
        all_reduce(total)
        scale = scale_of(total, self.joint.average)
        losses = {}
        if self.second_weight:
            losses[f'{ENSEMBLE}/loss'] = self.second_weight * scale * result.second_sum
        if weight:
            for name, value in zip(self.names, result.pull_sums, strict=True):
                losses[f'{name}/loss_kl'] = weight * scale * value
        if self.box is not None:
            losses.update(self._boxes_together(units.boxes, weight, scale * self.box.weight))
        return losses

    def _boxes_together(self, boxes: JointBoxes, weight: float, scale: Tensor) -> dict[str, Tensor]:
        second, pulls = self.box(boxes, self.weights if self.second.weights_from else None)
        losses = {}
        if self.second_weight:
            losses[f'{ENSEMBLE}/loss_box'] = self.second_weight * scale * second
        if weight:
            for name, value in zip(self.names, pulls, strict=True):
                losses[f'{name}/loss_kl_box'] = weight * scale * value
        return losses

    @torch.no_grad()
    def error_correlation(self, data: dict) -> Tensor:
        """Sums for the correlation of the networks' errors on a batch of a loader, in this mode.

        Args:
            data: What the loader gives, with labels.

        Returns:
            ``(N, N)`` float64.
        """
        data = self.data_preprocessor(data, False)
        taps = {}
        for name, network in self.students.items():
            with Taps(network, {path: path for path in self.joint.taps(name)}) as taps[name]:
                network_loss(network, data['inputs'][name], data['data_samples'][name])
        units = self.joint(taps, data['data_samples'], boxes=False)
        return networks_correlation(self._reader(units), self.difference)[0]

    def _reader(self, units: JointUnits) -> BlockReader:
        return BlockReader(
            [Side(*side) for side in zip(units.logits, units.align_corners, strict=True)],
            Labels(units.labels, self.joint.ignore_index, self.joint.background),
        )

    def _combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        if self.second.weights_from:
            weights = self.weights
        return self.second.combine(logits, labels, weights, self.kind)

    def _weigh_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.second.weigh_image(logits, labels, self.kind)


def _check_names(students: dict) -> None:
    if not isinstance(students, dict) or len(students) < 2:
        raise ValueError(
            '`students` should be a dict of two networks or more, such as dict(a=..., b=...): one '
            f'alone has nobody to learn from. Found {students if students else "none"!r}.'
        )
    taken = (ENSEMBLE, *RESERVED, *dir(ModuleDict()))
    for name in students:
        if not isinstance(name, str) or not name.isidentifier() or 'loss' in name or name in taken:
            raise ValueError(
                '`students` should have names that are identifiers, without "loss" in them, and '
                f'not those of the ensemble or of PyTorch. Found {name!r}.'
            )
