"""What is known of one step of two detectors that predict by queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mmdet.structures import DetDataSample
from torch import Tensor

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.detector_pair import IGNORED, Truth, ground_truth
from mmdistill_ext.units.query.family import Queries, QueryFamily, image_sizes, padded


class Objects:
    """The labelled objects of a batch, each part worked out when it is first asked for.

    Units are labelled objects, ``(B, G)``, ``G`` the most objects of any image.

    Args:
        samples: The batch's data samples.
    """

    def __init__(self, samples: list[DetDataSample]) -> None:
        self.samples = samples

    @cached_property
    def truth(self) -> list[Truth]:
        """Boxes, classes and ignored boxes of each image."""
        return ground_truth(self.samples)

    @cached_property
    def all_labels(self) -> Tensor:
        """Class of each object, ``(B, G)``, ignored beyond the objects of an image."""
        return padded([image.classes for image in self.truth], IGNORED)

    @cached_property
    def all_targets(self) -> Tensor:
        """Box of each object, ``(B, G, 4)``, zeros beyond the objects of an image."""
        return padded([image.boxes for image in self.truth])

    @cached_property
    def sizes(self) -> Tensor:
        """Width and height of each image, ``(B, 2)``."""
        return image_sizes(self.samples, self.all_targets)

    def queries(self, matches: Sequence[Tensor]) -> Tensor:
        """Objects of queries, ``(Q_i,)`` each -> queries of objects, ``(B, G)``, -1 for none."""
        queries = []
        for objects, image in zip(matches, self.truth, strict=True):
            none = objects.new_full((len(image.classes),), -1, dtype=objects.dtype)
            matched = (objects > 0).nonzero().squeeze(1)
            queries.append(none.index_put((objects[matched] - 1,), matched))
        return padded(queries, -1)


class Compared:
    """The objects that all of several models have a query for: ``P`` of ``(B, G)``.

    Args:
        objects: The labelled objects.
        queries: Queries of each object, ``(B, G)``, -1 where there is none, of each model.
    """

    def __init__(self, objects: Objects, queries: Sequence[Tensor]) -> None:
        self.objects, self.queries = objects, queries

    @cached_property
    def labels(self) -> Tensor:
        """Class of each object, ``(B, G)``, ignored where one of the models has no query."""
        labels = self.objects.all_labels
        for queries in self.queries:
            labels = labels.where(queries >= 0, IGNORED)
        return labels

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and object of the compared units, two of ``(P,)``."""
        images, objects = (self.labels != IGNORED).nonzero(as_tuple=True)
        return images, objects

    @cached_property
    def target_boxes(self) -> Tensor:
        """Boxes of the compared objects, ``(P, 4)``."""
        return self.objects.all_targets[self.index]

    @cached_property
    def scale(self) -> Tensor:
        """Size of the image of each compared object in pixels, ``(P,)``."""
        return self.objects.sizes[self.index[0]].prod(1).sqrt()

    def logits(self, own: Queries, queries: Tensor) -> Tensor:
        """Logits of the queries of all objects, ``(B, C, G)``."""
        return pick(own.scores, queries).transpose(1, 2)

    def boxes(self, own: Queries, queries: Tensor) -> Tensor:
        """Boxes of the queries of the compared objects, ``(P, 4)``."""
        return pick(own.boxes, queries)[self.index]


class QueryStep:
    """One step of student and teacher, each part worked out when it is first asked for.

    Args:
        student: Reads the student's queries.
        teacher: Reads the teacher's queries.
        taps: Calls of the student's head.
        teacher_call: Call of the teacher.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: QueryFamily,
        teacher: QueryFamily,
        taps: Taps,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        self.families = student, teacher
        self.taps, self.teacher_call, self.samples = taps, teacher_call, samples
        self.objects = Objects(samples)

    @cached_property
    def student(self) -> Queries:
        """The student's queries, with gradient."""
        return self.families[0].trained(self.taps, self.samples)

    @cached_property
    def teacher(self) -> Queries:
        """The teacher's queries."""
        return self.families[1].predicted(self.teacher_call, self.samples)

    @cached_property
    def teacher_queries(self) -> Tensor:
        """The teacher's query for each object, ``(B, G)``, -1 where there is none."""
        return self.objects.queries(self.teacher.objects)

    @cached_property
    def student_queries(self) -> Tensor:
        """The student's query for each object, ``(B, G)``, -1 where there is none."""
        return self.objects.queries(self.student.objects)

    @cached_property
    def compared(self) -> Compared:
        """The objects that both models have a query for."""
        return Compared(self.objects, (self.student_queries, self.teacher_queries))


def pick(values: Tensor, queries: Tensor) -> Tensor:
    """Values of queries ``(B, Q, D)`` -> of objects ``(B, G, D)``; any without a query."""
    places = queries.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, places)
