"""The block-wise pass by keywords, for tests that change one thing at a time."""

from mmdistill_ext.functional import (
    BlockwiseResult,
    CrossEntropy,
    Labels,
    Side,
    Split,
    blockwise_distillation,
    make_distance,
)


def distil(
    student,
    teacher,
    target,
    *,
    distance='kl',
    temperature=1.0,
    ignore_index=255,
    background=False,
    student_extra=None,
    teacher_extra=None,
    student_align_corners=False,
    teacher_align_corners=False,
    own=False,
    own_class_weight=None,
    split=None,
    simple=None,
    threshold=0.9,
    hard_weight=1.0,
    **options,
) -> BlockwiseResult:
    """``options`` go to the pass as they are."""
    return blockwise_distillation(
        Side(student, student_align_corners, student_extra),
        Side(teacher, teacher_align_corners, teacher_extra),
        Labels(target, ignore_index, background),
        distance=make_distance(distance, temperature),
        own=CrossEntropy(own_class_weight) if own else None,
        split=None if split is None else Split(split, threshold, hard_weight, simple),
        **options,
    )
