"""What is known of one step of two heads that predict a mask for each location."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.dense.step import DenseStep


class Chosen(NamedTuple):
    """The locations of one image whose masks are compared, one for each of ``K`` objects."""

    image: int
    rows: Tensor  # (K,), among the image's positive locations
    units: Tensor  # (K,), among all of its locations
    objects: Tensor  # (K,), among its labelled objects


class InstanceStep:
    """One step of student and teacher, each part worked out when it is first asked for.

    The masks of an object are compared at one location: of those that the student's own target
    assignment gives to the object, the one with the highest score of its class.

    Args:
        dense: The step of the heads that predict class and box of the locations.
        taps: Calls of the student.
        teacher_call: Call of the teacher's head that predicts class and box.
        objects: Gives the assigned object of each positive location of all images, ``(P,)``.
    """

    def __init__(self, dense: DenseStep, taps: Taps, teacher_call: Call, objects: Any) -> None:
        self.dense, self.taps, self.teacher_call = dense, taps, teacher_call
        self.samples, self._objects = dense.samples, objects

    @cached_property
    @torch.no_grad()
    def chosen(self) -> list[Chosen]:
        """The compared locations of each image."""
        images, units = self.dense.targets.index
        objects, most = self._objects(self), max(len(s.gt_instances) for s in self.samples) or 1
        best = first_of_each(images * most + objects, self._scores(images, units))
        counts = torch.bincount(images, minlength=len(self.samples))
        starts = counts.cumsum(0) - counts
        parts = (best - starts[images[best]], units[best], objects[best])
        sizes = torch.bincount(images[best], minlength=len(self.samples)).tolist()
        split = zip(*(part.split(sizes) for part in parts), strict=True)
        return [Chosen(image, *of_image) for image, of_image in enumerate(split)]

    @cached_property
    def images(self) -> Tensor:
        """Image of each compared mask, ``(P,)``."""
        return torch.cat([torch.full_like(x.objects, x.image) for x in self.chosen])

    def _scores(self, images: Tensor, units: Tensor) -> Tensor:
        """The student's logit of the assigned class at some locations, ``(P,)``."""
        student, labels = self.dense.student, self.dense.targets.assigned.labels[images, units]
        logits = student.common(student.all_outputs[0])
        flat = student.family.flatten(logits, student.family.score_channels)[images, units]
        return full_precision(flat).gather(1, labels[:, None]).squeeze(1)

    def masks_of(self) -> Iterator[tuple[Chosen, Tensor]]:
        """The compared locations of each image, with the labelled masks of their objects.

        The masks are ``(K, H, W)`` float, 0 and 1, in the size of the batch.
        """
        height, width = self.samples[0].metainfo['batch_input_shape']
        for chosen, sample in zip(self.chosen, self.samples, strict=True):
            masks = sample.gt_instances.masks
            if not isinstance(masks, Tensor):
                masks = masks.to_tensor(torch.bool, chosen.objects.device)
            masks = masks[chosen.objects]
            pads = (0, width - masks.shape[-1], 0, height - masks.shape[-2])
            yield chosen, torch.nn.functional.pad(masks.float(), pads)


def first_of_each(groups: Tensor, values: Tensor) -> Tensor:
    """Index of the largest value of each group, the groups in ascending order.

    Args:
        groups: Group of each value, ``(n,)``.
        values: ``(n,)``; of equal ones the first counts.

    Example:
        >>> first_of_each(torch.tensor([1, 0, 1, 0]), torch.tensor([2.0, 5.0, 3.0, 5.0]))
        tensor([1, 2])
    """
    order = values.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    found = groups[order]
    return order[torch.cat((found.new_ones(1).bool(), found[1:] != found[:-1]))[: len(found)]]
