"""What has to be known of a single-stage head: how it lays out predictions and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, wrapped
from mmdistill_ext.units.base import Painter
from mmdistill_ext.units.painters import Level, Levels
from mmdistill_ext.units.split.own_loss import OwnLoss

SplitLevels = Callable[[], list[tuple[Tensor, Tensor]]]
"""Gives two bool tensors ``(B, n)`` for each level: its simple and its positive units."""


class Assigned(NamedTuple):
    """The target assignment of a head for ``N`` units per image."""

    labels: Tensor  # (B, N), the number of classes for background
    valid: Tensor  # (B, N) bool, the head's loss counts the unit
    targets: Tensor  # (B, N, 4), box targets as the head encodes them; undefined for background
    classified: Tensor  # (B, N) bool, the head's loss trains the unit's class
    boxed: Tensor | None = None
    """(B, N) bool, the head's loss trains the unit's box; by default that of units with a class."""


class DenseFamily:
    """Reads the predictions and the targets of one family of single-stage heads (SEL-7, FIT-4).

    Everything is flattened to ``(B, N, ...)`` in mmdet's order: levels one after the other, within
    a level rows, columns, priors. This class fits a head with anchors whose ``get_targets`` gives
    labels, weights and box targets level by level; subclasses override what differs.

    Args:
        head: The head. Its ``forward`` gives ``(scores, boxes, ...)``, each a list of one map
            ``(B, A * channels, H, W)`` per level, which its ``loss_by_feat`` takes as its first
            arguments.
    """

    head: BaseModule
    head_type: type[nn.Module]
    """Class of the heads; set by :meth:`DenseFamilies.register`."""
    loss_methods: tuple[str, ...] = (
        'get_targets',
        '_get_targets_single',
        'loss_by_feat',
        'loss_by_feat_single',
    )
    """Methods that a subclass of :attr:`head_type` must not override: its targets or its loss would
    be read wrongly."""
    targets = 'get_targets'
    """Method of the head that assigns the targets, and is tapped."""
    more_targets: tuple[str, ...] = ()
    """Further methods of the head that take part in it, and are tapped."""
    labels_at = 0
    """Index of the labels in the return value of :attr:`targets`; weights and boxes follow."""
    targets_are_boxes = False
    """Box targets are decoded boxes even if ``reg_decoded_bbox`` is False."""
    knows_background = True
    """Background units train the classifier."""
    needs_assigner = True
    """A head without ``train_cfg.assigner`` cannot assign targets."""
    scores_at = 0
    """Index of the maps with the class logits in what ``forward`` returns."""
    assigner = 'assigner'
    """Attribute of the head that assigns targets, if :attr:`needs_assigner`."""
    has_boxes = True
    """The head predicts boxes; otherwise classes alone are compared."""
    unsplit: str | None = None
    """Why the head's own loss cannot be split (FIT-4), as a clause; None where it can."""
    teacher_trains = False
    """As a teacher the head computes as in training: in eval mode it gives no logits."""
    all_rows: tuple[str, ...] = ('loss_cls',)
    """Loss modules with a row for every unit; the others have rows for positive units only."""
    row_order: str = 'by_level'
    """How the loss modules get their rows: ``'by_level'``, one call per level in
    ``loss_by_feat_single``; in one call ``'level_first'``, level after level with one image after
    the other, or ``'image_first'``, image after image with one level after the other."""

    def __init__(self, head: BaseModule) -> None:
        self.head = head

    @property
    def taps(self) -> tuple[str, ...]:
        """Methods of the head that assign its targets."""
        return (self.targets, *self.more_targets)

    @property
    def prior_generator(self) -> Any:
        """Generator of the points or anchors that the units stand for."""
        return self.head.prior_generator

    @property
    def num_classes(self) -> int:
        """Number of classes, background not counted."""
        return self.head.num_classes

    @property
    def sigmoid(self) -> bool:
        """The classes are independent sigmoids; otherwise one softmax with background as last."""
        return self.head.use_sigmoid_cls

    @property
    def score_channels(self) -> int:
        """Scores per unit."""
        return self.head.cls_out_channels

    @property
    def box_channels(self) -> int:
        """Numbers that the head predicts per box."""
        return 4

    @property
    def bins(self) -> int | None:
        """Number of distances in the distribution of each side, of heads that predict one."""
        return None

    @property
    def strides(self) -> list[int]:
        """Stride of each level, in pixels."""
        return [int(stride[0]) for stride in self.prior_generator.strides]

    @property
    def priors_per_location(self) -> list[int]:
        """Number of priors at each location, for each level."""
        return list(self.prior_generator.num_base_priors)

    def base_anchors(self, places: Sequence[int]) -> Tensor:
        """Anchors of one location at these levels, ``(n, 4)``, of heads with several."""
        anchors = self.prior_generator.base_anchors
        return torch.cat([anchors[place] for place in places]).cpu()

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Class logits, box predictions and perhaps more, each level by level.

        Args:
            predicted: What the head's ``forward`` returned, or what its ``loss_by_feat`` was given.

        Returns:
            Maps ``(B, A * channels, H, W)``: ``score_channels`` logits, and ``box_channels``
            numbers that :meth:`decode` takes.
        """
        return predicted

    def painter(self, levels: Levels, size: tuple[int, int]) -> Painter:
        """What turns wins of the units into maps (SEL-4).

        Args:
            levels: Where the units lie.
            size: Height and width of the batch, in pixels.
        """
        return levels

    def levels(self, sizes: Sequence[tuple[int, int]]) -> Levels:
        """Where the units of all levels lie.

        Args:
            sizes: Height and width of each level's maps.
        """
        parts = zip(sizes, self.priors_per_location, self.strides, strict=True)
        return Levels(Level(h, w, count, stride) for (h, w), count, stride in parts)

    def priors(self, sizes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        """Points or anchors of each level, ``(n, 2 or 4)``, of the type and device of ``like``."""
        generator = self.prior_generator
        return generator.grid_priors(sizes, dtype=like.dtype, device=like.device)

    def flatten(self, maps: Sequence[Tensor], channels: int) -> Tensor:
        """``(B, A * channels, H, W)`` of each level -> ``(B, N, channels)``."""
        locations = [m.flatten(2).transpose(1, 2) for m in maps]
        return torch.cat([x.reshape(len(x), -1, channels) for x in locations], 1)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Turn box predictions into boxes.

        Args:
            priors: ``(P, 2 or 4)``.
            strides: ``(P,)``, in pixels.
            predicted: ``(P, box_channels)``, what the head predicts.

        Returns:
            ``(P, 4)``, corners in pixels.
        """
        return self.head.bbox_coder.decode(priors, predicted)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Turn box targets ``(P, 4)`` into boxes ``(P, 4)``."""
        if self.targets_are_boxes or self.head.reg_decoded_bbox:
            return targets
        return DenseFamily.decode(self, priors, strides, targets)

    def confidence(self, outputs: Sequence[Sequence[Tensor]], scores: Tensor) -> Tensor:
        """Scores in [0, 1], ``(B, N, score_channels)``.

        Args:
            outputs: What the head gave, level by level.
            scores: Its class logits, flattened.
        """
        return scores.sigmoid() if self.sigmoid else scores.softmax(-1)

    def distribution(self, predicted: Tensor) -> Tensor | None:
        """Logits ``(P, 4, bins)`` over the distances of the sides, of heads that predict them."""
        return None

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets of all levels.

        Args:
            calls: Calls of the method :attr:`targets`.
            levels: Where the units lie.
            more: Calls of each of :attr:`more_targets`.
        """
        places = slice(self.labels_at, self.labels_at + 3)
        labels, weights, boxes = (torch.cat(part, 1) for part in calls[-1].output[places])
        return Assigned(labels, weights > 0, boxes, weights > 0)

    @contextmanager
    def tell_rows(self, own: OwnLoss, split: SplitLevels) -> Iterator[None]:
        """Tell the head's loss modules which of their rows are simple (FIT-4).

        Args:
            own: Weighs the rows of the head's loss modules; its ``row_mask`` is set.
            split: Gives simple and positive units of each level, once the head has its targets.
        """
        if self.row_order == 'by_level':
            with self._tell_levels(own, split):
                yield
            return

        def join() -> tuple[Tensor, Tensor]:
            simple, positive = zip(*split(), strict=True)
            return self._join(simple), self._join(positive)

        self.tell_joined_rows(own, join)
        yield

    def _join(self, levels: Sequence[Tensor]) -> Tensor:
        """``(B, n)`` of each level -> flat, in the order of the head's rows."""
        if self.row_order == 'level_first':
            return torch.cat([level.flatten() for level in levels])
        return torch.cat(list(levels), 1).flatten()

    @contextmanager
    def _tell_levels(self, own: OwnLoss, split: SplitLevels) -> Iterator[None]:
        """Tell the rows of a head that forms its losses level by level."""
        level, chosen = -1, {}

        def count(single: Callable) -> Callable:
            def counting(*args: Any, **kwargs: Any) -> Any:
                nonlocal level
                level += 1
                return single(*args, **kwargs)

            return counting

        def row_mask(name: str) -> Tensor:
            simple, positive = (x.flatten() for x in split()[level])
            if name in self.all_rows:
                return simple
            if level not in chosen:  # selecting by a mask is a host sync: once per level
                chosen[level] = simple[positive]
            return chosen[level]

        own.row_mask = row_mask
        with wrapped(self.head, 'loss_by_feat_single', count):
            yield

    def tell_joined_rows(self, own: OwnLoss, join: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Tell the rows of a head that forms its losses for all levels at once.

        Args:
            own: Weighs the rows of the head's loss modules; its ``row_mask`` is set.
            join: Gives simple and positive units of all levels, flat, in the order of the rows.
        """

        def row_mask(name: str) -> Tensor:
            simple, positive = join()
            return simple if name in self.all_rows else simple[positive]

        own.row_mask = row_mask


def by_level(flat: Tensor, levels: Levels) -> Tensor:
    """``(B * N, ...)``, level after level with one image after the other -> ``(B, N, ...)``."""
    images = len(flat) // sum(levels.sizes)
    parts = flat.split([images * size for size in levels.sizes])
    return torch.cat([part.unflatten(0, (images, -1)) for part in parts], 1)


def logits_of(scores: Tensor) -> Tensor:
    """``log(p / (1 - p))`` in full precision of scores in [0, 1], of heads that give no logits."""
    scores = full_precision(scores).clamp(1e-12, 1 - 1e-6)
    return scores.log() - torch.log1p(-scores)


class DenseFamilies:
    """Which family reads which head: class of the head -> :class:`DenseFamily`.

    A family outside of this package is registered in the same way, in a module that the config
    names under ``custom_imports``.

    Example:
        >>> class MyHead(nn.Module):
        ...     pass
        >>> families = DenseFamilies()  # for the example; else DENSE_FAMILIES
        >>> @families.register(MyHead)
        ... class MyFamily(DenseFamily):
        ...     labels_at = 1
        >>> families.find(MyHead()).labels_at
        1
    """

    def __init__(self) -> None:
        self._families: dict[type[nn.Module], type[DenseFamily]] = {}

    def register(
        self, head_type: type[nn.Module]
    ) -> Callable[[type[DenseFamily]], type[DenseFamily]]:
        """Decorator: the family reads heads of this class, and of subclasses with the same loss.

        Raises:
            ValueError: The class has a family.
        """
        if head_type in self._families:
            raise ValueError(
                f'`DENSE_FAMILIES.register` should be called once for a class of heads. Found '
                f'{head_type.__name__}, which {self._families[head_type].__name__} reads.'
            )

        def add(family: type[DenseFamily]) -> type[DenseFamily]:
            family.head_type = head_type
            self._families[head_type] = family
            return family

        return add

    def find(self, head: nn.Module) -> DenseFamily | None:
        """The family of the nearest base class of a head; None when its targets or loss differ."""
        for base in type(head).__mro__:
            if base in self._families:
                family = self._families[base]
                same = all(
                    getattr(type(head), name, None) is getattr(base, name, None)
                    for name in family.loss_methods
                )
                return family(head) if same else None
        return None

    def __iter__(self) -> Iterator[type[DenseFamily]]:
        """All families, in the order of their registration."""
        return iter(self._families.values())

    def __str__(self) -> str:
        return ', '.join(head_type.__name__ for head_type in self._families)


DENSE_FAMILIES = DenseFamilies()
