"""What every registered loss is given: random inputs of each sort, and ways to change them.

A new loss is covered as soon as it is registered. What it is built from stands in ``ARGUMENTS`` if
its defaults do not do; what it is given follows from ``takes_features`` and, of losses of units,
from the heads that its ``check`` accepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch

import mmdistill_ext.losses  # noqa: F401  registers them
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.features import Features

ARGUMENTS: dict[str, dict] = {}
"""Arguments of losses that have no defaults, by the name of the class."""

CLASSES, IMAGES = 4, 4
LEVELS = (9, 4, 1)  # locations


def heads(num_classes=CLASSES, sigmoid=False, background=False, box_distances=()):
    """What a loss's ``check`` reads of a pair of heads; 2 classes for a binary head."""
    return SimpleNamespace(
        num_classes=num_classes,
        sigmoid=sigmoid,
        background=background,
        box_distances=box_distances,
    )


def registered() -> dict[str, type[DistillLoss]]:
    """Name -> class of every loss, except those that modules of the tests define."""
    items = MODELS.module_dict.items()
    return {
        name: kind
        for name, kind in items
        if isinstance(kind, type)
        and issubclass(kind, DistillLoss)
        and not kind.__module__.startswith('tests.')
    }


def build(name: str) -> DistillLoss:
    """A loss as a config would have it."""
    return MODELS.build(dict(type=f'mmdistill_ext.{name}', **ARGUMENTS.get(name, {})))


def random(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Inputs:
    """One sort of input. ``make`` draws it; the rest changes what was drawn."""

    def make(self, dtype=torch.float32):
        """``IMAGES`` images; the student's tensors are leaves with gradient."""
        raise NotImplementedError

    def ignore(self, data):
        """Nothing counts."""
        raise NotImplementedError

    def part(self, data, images: slice):
        """Some of the images."""
        return self.change(data, lambda x: x.detach()[images])

    def change(self, data, function: Callable, student=True, teacher=True):
        """Apply a function to the tensors of either side; the student's become leaves."""

        def apply(tensors, requires_grad):
            changed = [function(x).requires_grad_(requires_grad) for x in self.tensors(tensors)]
            return tuple(changed) if isinstance(tensors, tuple) else changed[0]

        sides = {}
        if student:
            sides['student'] = apply(data.student, True)
        if teacher:
            sides['teacher'] = apply(data.teacher, False)
        return dataclasses.replace(data, **sides)

    def equal(self, data):
        """The student is the teacher."""
        data = dataclasses.replace(data, student=data.teacher)
        return self.change(data, lambda x: x.detach().clone(), teacher=False)

    def with_student(self, data, leaves):
        """Other tensors of the student."""
        student = tuple(leaves) if isinstance(data.student, tuple) else leaves[0]
        return dataclasses.replace(data, student=student)

    @staticmethod
    def tensors(side) -> list[torch.Tensor]:
        return list(side) if isinstance(side, tuple) else [side]


class UnitInputs(Inputs):
    """Units of one sort of head.

    Args:
        pair: What the heads are.
        shapes: Of student, teacher and labels, without images and channels; of levels the numbers
            of locations of student and teacher are tuples.
        labels: Number of label values.
        channels: Of the logits.
    """

    def __init__(self, pair, student, teacher, target, channels, labels):
        self.pair, self.shapes, self.target = pair, (student, teacher), target
        self.channels, self.labels = channels, labels

    @property
    def options(self):
        levels = self.shapes[0] == LEVELS
        background = self.pair.background and self.pair.sigmoid
        return dict(sigmoid=self.pair.sigmoid, background=background, ignore_index=-1), levels

    def make(self, dtype=torch.float32):
        options, levels = self.options
        sides = []
        for seed, shape in enumerate(self.shapes):
            if levels:
                sizes = [(IMAGES, 2, self.channels, n) for n in shape]
            else:
                sizes = [(IMAGES, self.channels, *shape)]
            tensors = [random(*s, seed=seed + 7 * i, dtype=dtype) for i, s in enumerate(sizes)]
            sides.append(tuple(tensors) if levels else tensors[0])
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(-1, self.labels, (IMAGES, *self.target), generator=generator)
        return self.change(Units(*sides, labels, **options), lambda x: x, teacher=False)

    def ignore(self, data):
        return self.relabel(data, -1)

    def relabel(self, data, label):
        return dataclasses.replace(data, labels=torch.full_like(data.labels, label))

    def part(self, data, images):
        data = dataclasses.replace(data, labels=data.labels[images])
        return super().part(data, images)


UNITS = {
    'softmax map': UnitInputs(heads(), (3, 5), (6, 10), (6, 10), CLASSES, CLASSES),
    'sigmoid map': UnitInputs(heads(sigmoid=True), (6, 7), (3, 4), (6, 7), CLASSES, CLASSES),
    'binary map': UnitInputs(heads(2, sigmoid=True), (6, 7), (3, 4), (6, 7), 1, 2),
    'sigmoid levels': UnitInputs(
        heads(sigmoid=True, background=True), LEVELS, LEVELS, (28,), CLASSES, CLASSES + 1
    ),
    'softmax RoIs': UnitInputs(
        heads(background=True), (11,), (11,), (11,), CLASSES + 1, CLASSES + 1
    ),
}


class FeatureInputs(Inputs):
    """Features of two taps, with the weight of each place."""

    def make(self, dtype=torch.float32):
        shape = (IMAGES, 6, 5, 7)
        student, teacher = (random(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
        weight = torch.rand(IMAGES, 1, 5, 7, generator=torch.Generator().manual_seed(2))
        weight = weight.masked_fill(weight < 0.3, 0)
        return Features(student.requires_grad_(), teacher, weight)

    def ignore(self, data):
        return dataclasses.replace(data, weight=torch.zeros_like(data.weight))

    def part(self, data, images):
        return super().part(dataclasses.replace(data, weight=data.weight[images]), images)


FEATURES = {'features': FeatureInputs()}


def accepted(name: str) -> dict[str, Inputs]:
    """The inputs that a loss is for; of a loss of units those whose heads it does not refuse."""
    if registered()[name].takes_features:
        return FEATURES
    inputs = {}
    for sort, units in UNITS.items():
        try:
            build(name).check(units.pair)
        except ValueError:
            continue
        inputs[sort] = units
    return inputs


CASES = [(name, sort) for name in registered() for sort in accepted(name)]


def inputs_of(sort: str) -> Inputs:
    """By its name."""
    return (UNITS | FEATURES)[sort]


def total(losses: dict) -> torch.Tensor:
    """What the model is trained with."""
    return sum(value for key, value in losses.items() if key.startswith('loss'))


def outcome(loss: DistillLoss, inputs: Inputs, data) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss, and its gradient with respect to each tensor of the student."""
    value = total(loss(data))
    leaves = inputs.tensors(data.student)
    return value.detach(), list(torch.autograd.grad(value, leaves))
