"""What several networks predict for one unit: the data of collaborative training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.padding import pad_semantic_labels


@dataclass(frozen=True)
class JointBoxes:
    """Boxes of N detectors for ``P`` positive units, ``(x1, y1, x2, y2)`` in pixels of the input.

    Args:
        networks: Boxes of each network, ``(P, 4)``, with gradient.
        target: ``(P, 4)``, the assigned boxes.
        scale: ``(P,)``, stride of the location, in pixels.
    """

    networks: tuple[Tensor, ...]
    target: Tensor
    scale: Tensor


@dataclass(frozen=True)
class JointUnits:
    """Predictions of N networks for the same units, with their labels.

    Args:
        logits: Logits of each network, ``(B, C, ...)`` at any stride, or for a detector the levels,
            ``(B, A, C, n)`` each.
        labels: ``(B, ...)``, for levels ``(B, N)``; in ``[0, C)``, C for background where there is
            one, or ``ignore_index``.
        align_corners: ``align_corners`` of each network's head.
        boxes: Boxes of the positive units; None where there are none, or nobody needs them.
    """

    logits: tuple[Tensor | tuple[Tensor, ...], ...]
    labels: Tensor
    align_corners: tuple[bool, ...]
    boxes: JointBoxes | None = None


class JointHeads(ABC):
    """Joins the heads that several networks predict with, unit by unit (COL-8).

    Building one checks that the heads fit each other; calling it turns what was tapped in one step
    into :class:`JointUnits`. It keeps nothing of a step.

    Attributes:
        num_classes: Number of label classes, background not counted; 2 for binary heads.
        ignore_index: Label of units that are ignored.
        sigmoid: The heads predict independent sigmoids instead of one softmax.
        background: Labels go from 0 to C, and the last of them is background.
    """

    num_classes: int
    ignore_index: int
    sigmoid: bool
    background: bool

    has_boxes: bool = True
    """All heads of detectors predict boxes besides classes."""
    is_detection: ClassVar[bool]
    """Units belong to objects: there are boxes, and averages are over the positive units."""
    average: ClassVar[str]
    """What losses are averaged over, ``'valid'`` or ``'positive'`` units."""
    prefix: ClassVar[str]
    """Prefix of the names of the networks' own losses; it is left out of the log."""

    @staticmethod
    @abstractmethod
    def labels_of(sample: BaseDataElement) -> Tensor:
        """All labels of an image, to be checked before the first step."""

    @abstractmethod
    def taps(self, name: str) -> tuple[str, ...]:
        """Paths of the methods of a network whose calls are needed."""

    def parts_in_training(self, network: BaseModel) -> list[nn.Module]:
        """Modules of a network that compute as in training, without their layers, when measured.

        Without them there is no loss in eval mode.
        """
        return []

    @abstractmethod
    def __call__(
        self,
        taps: Mapping[str, Taps],
        data_samples: Mapping[str, list],
        boxes: bool,
    ) -> JointUnits:
        """Build the units of one step.

        Args:
            taps: Name -> calls of the network's :meth:`taps`.
            data_samples: Name -> the batch's data samples.
            boxes: The boxes are needed too.

        Raises:
            ValueError: The networks saw images of different sizes.
        """

    def evaluated(
        self,
        networks: Mapping[str, BaseModel],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list],
    ) -> JointUnits:
        """The units of a batch that nothing is learned from, in eval mode (COL-3).

        Args:
            networks: Name -> network.
            inputs: Name -> preprocessed batch ``(B, 3, H, W)``.
            data_samples: Name -> the batch's data samples, with labels.
        """
        taps = {}
        for name, network in networks.items():
            pad_semantic_labels(network.data_preprocessor, data_samples[name])
            parts = self.parts_in_training(network)
            paths = {path: path for path in self.taps(name)}
            with training_flags(parts), Taps(network, paths) as taps[name]:
                network(inputs[name], data_samples[name], mode='loss')
        return self(taps, data_samples, boxes=False)

    @abstractmethod
    def predict(
        self,
        networks: Mapping[str, BaseModel],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list],
        weights: Tensor,
    ) -> list:
        """The ensemble's predictions; ``sample.networks`` holds those of every network.

        Args:
            networks: Name -> network.
            inputs: Name -> preprocessed batch ``(B, 3, H, W)``.
            data_samples: Name -> the batch's data samples.
            weights: ``(N,)``, weights of the networks in the ensemble.
        """


def shallow_copy(sample: BaseDataElement) -> BaseDataElement:
    """A data sample to put a network's own prediction in; what it holds is shared."""
    copied = type(sample)(metainfo=sample.metainfo)
    for name, value in sample.items():
        copied.set_data({name: value})
    return copied


def with_networks(
    ensemble: list[BaseDataElement], networks: Mapping[str, list[BaseDataElement]]
) -> list[BaseDataElement]:
    """Put every network's data sample into the ensemble's, as ``sample.networks[name]``."""
    for place, sample in enumerate(ensemble):
        own = {name: samples[place] for name, samples in networks.items()}
        sample.set_field(own, 'networks', dtype=dict)
    return ensemble
