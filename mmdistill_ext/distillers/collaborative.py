"""Several networks that teach each other, without a teacher (COL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, ModuleDict
from torch import Tensor

from mmdistill_ext.arguments import check_arguments
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.first_step import check_schedules, named_at_first
from mmdistill_ext.distillers.loss_guard import LossGuard
from mmdistill_ext.distillers.network_configs import find_reference, network_configs
from mmdistill_ext.distillers.recompute import network_loss, recomputed_loss
from mmdistill_ext.distillers.schedule import Schedule, build_schedule
from mmdistill_ext.functional.checks import check_labels
from mmdistill_ext.losses.boxes.joint_box_term import JointBoxTerm
from mmdistill_ext.losses.collaboration_loss import CollaborationLoss
from mmdistill_ext.policies.second_predictions import LabelSpec, build_second_prediction
from mmdistill_ext.preprocessing.network_inputs import NetworkInputs
from mmdistill_ext.registry import MODELS
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.joint import JointHeads
from mmdistill_ext.units.joint_pairing import pair_networks


@MODELS.register_module()
class CollaborativeDistiller(BaseModel):
    """Trains N >= 2 networks together on one task (COL-1 to COL-8; KDCL, CVPR 2020).

    Each has its own loss (COL-2). Their logits form a second prediction per unit (COL-3), whose
    loss trains all of them, and each is pulled to it, detached, by a KL divergence (COL-4, COL-5).
    The order in which ``students`` names them means nothing: weights and logs are in the order of
    their names. Data samples that it predicts hold the ensemble's prediction, the weighted mean of
    the networks' logits (for detectors NMS over all boxes, scores times weight), and
    ``sample.networks`` holds every network's own.

    The log has ``<name>/...`` for each network's own losses, ``<name>/loss_kl``, and
    ``ensemble/loss``.

    Args:
        students: Name -> network: a model dict, a config path, or ``'mmseg::pspnet/...py'``.
        second: Config of the second prediction: ``MinLoss``, ``Linear``, ``MinLogit``,
            ``ValidationWeighted`` or ``General``.
        kl: The pull, ``dict(weight=1.0, temperature=1.0, begin=0, warmup=0, stop=None)``.
        second_weight: Weight of the second loss, >= 0.
        box: Detectors: ``dict(weight=1.0, distance='iou'|'l1')`` to make a second prediction of the
            boxes too (see
            :class:`~mmdistill_ext.losses.boxes.joint_box_term.JointBoxTerm`); logged as
            ``ensemble/loss_box`` and ``<name>/loss_kl_box``.
        sequential_backward: Free each network's activations after its forward and recompute them
            when its backward pass comes (a second forward), so that one network's are in memory at
            a time. Gradients are the same.
        reference: Name of the network whose target assignment (of a detector) and padding the
            networks are compared and predict by; the first by name when not given.
        data_preprocessor: For networks that name none; the runner hands it over when the config
            has one beside the model.
        pretrained: None; ``mmseg.apis.init_model`` sets it in any model's config.
        train_cfg: None, for the same reason.

    Attributes:
        second: The policy of the second prediction.
        collaboration: The losses of what the networks do together.
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
        reference: str | None = None,
        data_preprocessor: dict | None = None,
        pretrained: None = None,
        train_cfg: None = None,
    ) -> None:
        configs = network_configs(students, data_preprocessor)
        networks = {name: build_model(cfg, f'students.{name}') for name, cfg in configs.items()}
        preprocessors = {name: cfg.get('data_preprocessor') for name, cfg in configs.items()}
        super().__init__(NetworkInputs(networks, preprocessors))
        self.students = ModuleDict(networks)  # mmengine's, which hands on `init_weights`
        self.register_buffer('weights', torch.full((len(networks),), 1 / len(networks)))
        self.reference = find_reference(reference, self.names)
        self.joint = pair_networks(networks, self.reference)
        difference = 'bce' if self.joint.sigmoid else 'ce'
        label_spec = LabelSpec(difference, self.joint.ignore_index, self.joint.background)
        self.second = build_second_prediction(second, label_spec)
        self.schedule, temperature = _build_schedule(kl)
        self.collaboration = CollaborationLoss(
            self.names,
            self.second,
            is_detection=self.joint.is_detection,
            num_classes=self.joint.num_classes,
            second_weight=second_weight,
            temperature=temperature,
            box=_build_box(box, self.joint),
        )
        self.sequential_backward = sequential_backward
        self.loss_guard = LossGuard()
        self._labels_checked = False
        self._started = False
        self.has_hook = False  # a hook takes the weights from the validation

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
        """Losses, predictions or raw outputs, from ``inputs`` and ``data_samples`` by network.

        Args:
            inputs: Name -> batch ``(B, C, H, W)``, preprocessed for the network.
            data_samples: Name -> the batch's data samples.
            mode: ``'loss'``, ``'predict'`` or ``'tensor'``.

        Returns:
            Named scalars, the ensemble's data samples, or name -> the network's output.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples or {})
        if mode == 'predict':
            return self.joint.predict(self.students, inputs, data_samples or {}, self.weights)
        samples = data_samples or {}
        return {
            name: network(inputs[name], samples.get(name), mode=mode)
            for name, network in self.students.items()
        }

    def loss(
        self, inputs: Mapping[str, Tensor], data_samples: Mapping[str, list]
    ) -> dict[str, Tensor | list[Tensor]]:
        """The networks' own losses, and the losses of their second prediction (COL-2 to COL-5).

        Args:
            inputs: Name -> batch ``(B, C, H, W)``, preprocessed for the network.
            data_samples: Name -> the batch's data samples, with labels.

        Raises:
            ValueError: A label is outside of the classes (the first batch is looked at), or the
                weights should come from the validation and no hook brings them.
        """
        self._check_hook()
        if not self._started:
            check_schedules([self.schedule])
        self._check_labels(data_samples[self.reference])
        self.loss_guard.see(inputs, data_samples[self.reference])
        run = recomputed_loss if self.sequential_backward else network_loss
        own_losses, taps = self._run(run, inputs, data_samples)
        self._started = True
        losses = {
            f'{name}/{key.removeprefix(self.joint.prefix)}': value
            for name, of_network in own_losses.items()
            for key, value in of_network.items()
        }
        weight = self.schedule.at(MessageHub.get_current_instance().get_info('iter', 0))
        if weight or self.collaboration.second_weight:
            units = self.joint(taps, data_samples, boxes=self.collaboration.box is not None)
            losses.update(self.collaboration(units, weight, self.weights))
        for calls in taps.values():
            calls.clear()
        return losses

    def parse_losses(self, losses: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which is looked at before the optimizer's step, and the terms."""
        loss, log_vars = super().parse_losses(losses)
        self.loss_guard.watch(loss, log_vars)
        return loss, log_vars

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the labels that the networks are compared by."""
        try:
            self.joint.labels_of(sample['data_samples'])
        except AttributeError:  # a data sample has no other fields than those packed into it
            return False
        return True

    @torch.no_grad()
    def error_correlation(self, data: dict) -> Tensor:
        """Sums for the correlation of the networks' errors on a batch, in eval mode.

        Args:
            data: What the loader gives, with labels.

        Returns:
            ``(N, N)`` float64.
        """
        data = self.data_preprocessor(data, False, compared=True)
        units = self.joint.evaluated(self.students, data['inputs'], data['data_samples'])
        return self.collaboration.error_correlation(units)

    def _run(
        self, run: Callable, inputs: Mapping[str, Tensor], data_samples: Mapping[str, list]
    ) -> tuple[dict[str, dict], dict[str, Taps]]:
        """Each network's own losses, and the calls that its units are built from, by its name."""
        losses, taps = {}, {}
        for name, network in self.students.items():
            with Taps(network, {path: path for path in self.joint.taps(name)}) as taps[name]:
                form = run if self._started else named_at_first(f'students.{name}', run)
                losses[name] = form(network, inputs[name], data_samples[name])
        return losses, taps

    def _check_hook(self) -> None:
        if self.second.weights_from and not self.has_hook:
            raise ValueError(
                f'`second`={type(self.second).__name__} takes its weights from the validation: it '
                "needs dict(type='mmdistill_ext.CollaborationHook') in `custom_hooks`. Found none."
            )

    def _check_labels(self, data_samples: list) -> None:
        """Look at the labels of the first batch."""
        if self._labels_checked:
            return
        for sample in data_samples:
            labels = self.joint.labels_of(sample)
            check_labels(labels, self.joint.num_classes, self.joint.ignore_index)
        self._labels_checked = True


def _build_schedule(kl: dict | None) -> tuple[Schedule, float]:
    """When the pull counts, and its temperature."""
    kl = dict(kl or {})
    temperature = kl.pop('temperature', 1.0)
    return build_schedule(kl, 'kl'), temperature


def _build_box(box: dict | None, joint: JointHeads) -> JointBoxTerm | None:
    if box is None:
        return None
    if not joint.is_detection:
        raise ValueError(f'`box` is for detectors, segmenters have none. Found {box!r}.')
    if not joint.has_boxes:
        raise ValueError(f'`box` needs networks whose heads all predict boxes. Found {box!r}.')
    check_arguments(JointBoxTerm, box, 'box')
    return JointBoxTerm(**box)
