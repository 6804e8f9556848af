"""What has to be known of a head that predicts by queries: how its queries are read and matched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.by_class import ByClass
from mmdistill_ext.units.split.own_loss import OwnLoss

SimpleRows = Callable[[Sequence[Tensor]], list[Tensor]]
"""Objects of the queries of each image, ``(Q_i,)`` -> which of the queries are simple, bool."""


class Queries(NamedTuple):
    """The queries of one head in one step, on the layer that it predicts with.

    Images with fewer queries than others are filled up; ``objects`` has the queries there are.
    """

    scores: Tensor  # (B, Q, C) or with background (B, Q, C + 1), logits
    boxes: Tensor  # (B, Q, 4), corners in pixels
    objects: list[Tensor]  # (Q_i,) for each image: the query's object from 1 on, 0 for none


class QueryFamily(ABC):
    """Reads and matches the queries of one kind of head (SEL-7, FIT-4).

    Args:
        model: The detector.
        path: Path of the head.
        head: The head at this path.

    Attributes:
        taps: Paths of all methods of a student whose calls are needed.
        loss_tap: Path of the method among them that forms the head's own loss.
        teacher_tap: Path in a teacher whose call is needed.
    """

    loss_methods: ClassVar[tuple[str, ...]]
    """Methods that a subclass of the registered class must not override."""
    assigner_key: ClassVar[str] = 'train_cfg.assigner'
    """Key of a model's config that says how queries are matched, for errors."""
    taps: tuple[str, ...]
    loss_tap: str
    teacher_tap: str

    def __init__(self, model: nn.Module, path: str, head: nn.Module) -> None:
        self.model: Any = model
        self.path = path
        self.head: Any = head

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether the rest of the model is as this family reads it."""
        return True

    @property
    def num_classes(self) -> int:
        """Number of classes, background not counted."""
        return self.head.num_classes

    @property
    def sigmoid(self) -> bool:
        """The classes are independent sigmoids; otherwise one softmax with background as last."""
        return self.head.loss_cls.use_sigmoid

    @property
    def predicts(self) -> bool:
        """The detector predicts with this head."""
        return True

    @property
    @abstractmethod
    def has_assigner(self) -> bool:
        """The head can match queries to objects."""

    @abstractmethod
    def trained(self, taps: Taps, samples: Sequence[DetDataSample]) -> Queries:
        """The queries of a student, matched by its own loss.

        Args:
            taps: Calls of :attr:`taps`.
            samples: The batch's data samples.
        """

    @abstractmethod
    def predicted(self, call: Call, samples: Sequence[DetDataSample]) -> Queries:
        """The queries of a teacher, matched by its own assigner, without gradient.

        Args:
            call: Call of :attr:`teacher_tap`.
            samples: The batch's data samples.
        """

    @abstractmethod
    def own_losses(self, losses: Mapping[str, Any]) -> dict[str, Any]:
        """The losses on matched queries, out of what the method at :attr:`loss_tap` returned."""

    @abstractmethod
    def tell_rows(
        self, head: nn.Module, own: OwnLoss, taps: Taps, images: int, simple: SimpleRows
    ) -> AbstractContextManager:
        """While it is entered, ``own.row_mask`` says which rows of the head's losses are simple.

        Args:
            head: The head that is trained, perhaps a copy of this family's.
            own: Weighs the rows of the head's loss modules.
            taps: Calls of the student, those that run included.
            images: Number of images in the batch.
            simple: Tells simple queries by their objects.
        """


QUERY_FAMILIES: ByClass[type[QueryFamily]] = ByClass()
"""Class of a head -> its family. A family outside of this package is registered in the same way,
in a module that the config names under ``custom_imports``."""


def padded(values: Sequence[Tensor], value: float = 0) -> Tensor:
    """``(Q_i, ...)`` of each image -> ``(B, Q, ...)``."""
    return pad_sequence(list(values), batch_first=True, padding_value=value)


def image_sizes(samples: Sequence[DetDataSample], like: Tensor) -> Tensor:
    """Width and height of each image, ``(B, 2)`` float32, on the device of ``like``."""
    sizes = [sample.metainfo['img_shape'][:2][::-1] for sample in samples]
    return like.new_tensor(sizes).float()
