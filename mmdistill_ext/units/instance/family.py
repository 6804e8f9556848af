"""What has to be known of a head that predicts a mask for each location."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdistill_ext.units.instance.step import InstanceStep


class InstanceFamily(ABC):
    """Reads the masks of one family of heads (SEL-1, SEL-7).

    Args:
        model: The detector.
        path: Path of the part that predicts masks.

    Attributes:
        head: That part.
        dense: Path of the head that predicts class and box of the locations.
    """

    head: Any
    loss: ClassVar[str]
    """Method that forms the own loss of the masks; of :attr:`owner`."""
    refused: ClassVar[str | None] = None
    """Why masks of this family are not compared; None where they are."""
    taps: ClassVar[tuple[str, ...]] = ()
    """Methods of :attr:`owner` whose calls are needed; ``''`` for the part itself."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.head = model.get_submodule(path)
        self.path, self.dense, self.model = path, 'bbox_head', model

    @property
    def owner(self) -> str:
        """Path of what forms the loss of the masks."""
        return self.path

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the methods of the student whose calls are needed."""
        return tuple(f'{self.owner}.{name}' if name else self.owner for name in self.taps)

    def positive(self, step: InstanceStep) -> list[InstanceData]:
        """What the box head tells the mask head of the positive locations of each image."""
        return step.taps[self.path].args[1]

    def objects(self, step: InstanceStep) -> Tensor:
        """The object assigned to each positive location of all images, ``(P,)``."""
        return torch.cat([image.pos_assigned_gt_inds for image in self.positive(step)])

    @abstractmethod
    def student(self, step: InstanceStep) -> Tensor:
        """The student's mask logits at the chosen locations, ``(P, 1, h, w)``, with gradient."""

    @abstractmethod
    def teacher(self, step: InstanceStep, student: InstanceFamily) -> Tensor:
        """The teacher's mask logits at the chosen locations, ``(P, 1, h, w)``.

        Args:
            step: What is known of the step.
            student: The family of the student's head.
        """

    @abstractmethod
    def labels(self, step: InstanceStep) -> Tensor:
        """1 inside of the object, 0 outside, and ignored, ``(P, h, w)``."""

    def of_teacher(self, step: InstanceStep, output: int, channels: int) -> list[Tensor]:
        """What the teacher's locations predict at the chosen ones, ``(K, channels)`` by image."""
        teacher = step.dense.teacher
        maps = teacher.common(teacher.all_outputs[output])
        flat = teacher.family.flatten(maps, channels)
        return [flat[chosen.image, chosen.units] for chosen in step.chosen]


INSTANCE_FAMILIES: dict[type[nn.Module], type[InstanceFamily]] = {}


def register(head_type: type[nn.Module]) -> Callable[[type[InstanceFamily]], type[InstanceFamily]]:
    """Decorator: the family reads the masks that such a part of a detector predicts."""

    def add(family: type[InstanceFamily]) -> type[InstanceFamily]:
        INSTANCE_FAMILIES[head_type] = family
        return family

    return add


def in_one(masks: list[Tensor]) -> Tensor:
    """Masks of each image, ``(K, h, w)``, as ``(P, 1, h, w)``."""
    some = [of_image for of_image in masks if len(of_image)]
    return torch.cat(some or masks[:1]).unsqueeze(1)
