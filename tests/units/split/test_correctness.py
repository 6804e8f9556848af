import itertools

import pytest
import torch

from mmdistill_ext.units.split.correctness import (
    Detections,
    correct_images,
    correct_units,
    seen_units,
)

CLASSES, UNITS = 3, 12
RULES = list(itertools.product([0.3, 0.5, 1.0], [0.0, 0.3, 0.8]))
BACKGROUND = CLASSES


def overlap(a, b):
    """IoU of two boxes, as floats."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return width * height / (areas - width * height)


def draw_truth(generator, objects):
    corners = torch.randint(0, 40, (objects, 2), generator=generator).float()
    sizes = torch.randint(10, 30, (objects, 2), generator=generator).float()
    boxes = torch.cat((corners, corners + sizes), 1)
    ignored = torch.tensor([[0.0, 0.0, 40.0, 30.0]])[: objects // 2]  # in some images a crowd
    return boxes, torch.randint(0, CLASSES, (objects,), generator=generator), ignored


def make(seed, images=6):
    """Objects, and a teacher that finds most of them; one image has none."""
    generator = torch.Generator().manual_seed(seed)
    truth = [draw_truth(generator, image % 3) for image in range(images)]
    labels = torch.full((images, UNITS), BACKGROUND)
    boxes = torch.rand(images, UNITS, 4, generator=generator) * 20
    boxes[..., 2:] += 25
    confidence = torch.rand(images, UNITS, CLASSES, generator=generator) * 0.02
    for image, (objects, classes, _) in enumerate(truth):
        for number, label in enumerate(classes):
            for unit in range(2 * number, 2 * number + 2):
                labels[image, unit] = label
                jitter = torch.rand(4, generator=generator) * (seed % 3) * 5
                boxes[image, unit] = objects[number] + jitter
                confidence[image, unit, label] = torch.rand((), generator=generator)
    stray = torch.rand(images, UNITS, generator=generator) < 0.04
    confidence[stray] = torch.rand(int(stray.sum()), CLASSES, generator=generator)
    valid = torch.rand(images, UNITS, generator=generator) < 0.9
    return confidence, labels, valid, boxes, truth


def share_inside(box, crowd):
    width = max(0, min(box[2], crowd[2]) - max(box[0], crowd[0]))
    height = max(0, min(box[3], crowd[3]) - max(box[1], crowd[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def unit_is_right(confidence, label, box, target, iou, score):
    """FIT-3, for one unit; a softmax has a score for background."""
    likeliest = confidence.index(max(confidence))
    if label != BACKGROUND:
        return likeliest == label and overlap(box, target) >= iou
    if len(confidence) > CLASSES:
        return likeliest == BACKGROUND
    return all(value <= score for value in confidence)


def image_is_right(confidence, valid, boxes, truth, iou, score):
    """FIT-3, for one image: every object is found, and nothing else is seen."""
    objects = list(zip(truth[0].tolist(), truth[1].tolist(), strict=True))
    found = set()
    for unit in range(UNITS):
        values = confidence[unit].tolist()
        if not valid[unit] or max(values) <= score:
            continue
        hits = {
            number
            for number, (box, kind) in enumerate(objects)
            if kind == values.index(max(values)) and overlap(boxes[unit].tolist(), box) >= iou
        }
        found |= hits
        inside = any(
            share_inside(boxes[unit].tolist(), crowd) >= iou for crowd in truth[2].tolist()
        )
        if not hits and not inside:
            return False
    return len(found) == len(objects)


@pytest.mark.parametrize('softmax', [False, True])
@pytest.mark.parametrize(('iou', 'score'), RULES)
def test_units_follow_the_rule_one_by_one(iou, score, softmax):
    results = []
    for seed in range(6):
        confidence, labels, _, boxes, truth = make(seed)
        if softmax:
            confidence = torch.cat((confidence, 1 - confidence.amax(-1, True)), -1)
        index = (labels < CLASSES).nonzero(as_tuple=True)
        places = list(zip(*(x.tolist() for x in index), strict=True))
        targets = {(image, unit): truth[image][0][unit // 2].tolist() for image, unit in places}
        ious = torch.tensor([overlap(boxes[p].tolist(), targets[p]) for p in places])
        found = correct_units(confidence, labels, CLASSES, index, ious, iou, score)
        for image, unit in itertools.product(range(len(labels)), range(UNITS)):
            expected = unit_is_right(
                confidence[image, unit].tolist(),
                labels[image, unit].item(),
                boxes[image, unit].tolist(),
                targets.get((image, unit)),
                iou,
                score,
            )
            assert found[image, unit].item() == expected, (seed, image, unit)
        results.append(found.flatten())
    assert 0 < torch.cat(results).float().mean() < 1


@pytest.mark.parametrize(('iou', 'score'), RULES)
def test_images_follow_the_rule_one_by_one(iou, score):
    results = []
    for seed in range(12):
        confidence, _, valid, boxes, truth = make(seed)
        seen = seen_units(confidence, valid, lambda i, units, _, b=boxes: b[i][units], score)
        found = correct_images(seen, truth, iou)
        parts = zip(confidence, valid, boxes, truth, strict=True)
        expected = [image_is_right(*part, iou, score) for part in parts]
        assert found.tolist() == expected
        results.append(found)
    with_objects = torch.stack(results)[:, torch.arange(6) % 3 > 0]
    assert score == 0 or 0 < torch.stack(results).float().mean() < 1
    if (iou, score) == (0.3, 0.3):  # else the found ones would all be empty
        assert 0 < with_objects.float().mean() < 1


def test_boxes_are_asked_for_the_seen_units_and_their_classes_alone():
    confidence, _, valid, boxes, _ = make(0)
    asked = []

    def boxes_of(image, units, classes):
        asked.append((image, units.tolist(), classes.tolist()))
        return boxes[image][units]

    seen_units(confidence, valid, boxes_of, 0.3)
    best, kinds = confidence.max(-1)
    for image, units, classes in asked:
        seen = ((best[image] > 0.3) & valid[image]).nonzero().flatten()
        assert units == seen.tolist()
        assert classes == kinds[image][seen].tolist()
    assert [image for image, *_ in asked] == list(range(6))


@pytest.mark.parametrize('seen', [False, True])
def test_an_image_without_objects_is_right_when_nothing_is_seen(seen):
    confidence = torch.full((1, UNITS, CLASSES), 0.1)
    confidence[0, 3, 1] = 0.9 if seen else 0.1
    truth = [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))]
    boxes = torch.tensor([0.0, 0.0, 9.0, 9.0]).expand(UNITS, 4)
    for valid in (True, False):
        units = torch.full((1, UNITS), valid)
        found = correct_images(
            seen_units(confidence, units, lambda image, units, _: boxes[units], 0.3), truth, 0.5
        )
        assert found.tolist() == [not (seen and valid)]


def test_values_that_are_no_numbers_are_not_right():
    confidence, labels, _, _, _ = make(0)
    index = (labels < CLASSES).nonzero(as_tuple=True)
    ious = torch.full(index[0].shape, float('nan'))
    assert not correct_units(confidence, labels, CLASSES, index, ious, 0.5, 0.3)[index].any()
    broken = torch.full_like(confidence, float('nan'))
    ious = torch.ones(index[0].shape)
    found = correct_units(broken, labels, CLASSES, index, ious, 0.5, 0.3)
    assert not found.any()


OBJECT = [10.0, 10.0, 50.0, 50.0]
NEAR, FAR = [12.0, 10.0, 52.0, 50.0], [60.0, 60.0, 90.0, 90.0]


@pytest.mark.parametrize(
    ('boxes', 'classes', 'right'),
    [
        ([NEAR], [1], True),
        ([NEAR, OBJECT, NEAR], [1, 1, 1], True),  # duplicates
        ([NEAR], [2], False),
        ([FAR], [1], False),
        ([NEAR, FAR], [1, 1], False),
        ([NEAR, NEAR], [1, 2], False),  # on the object, of another class
        ([NEAR, [30.0, 10.0, 70.0, 50.0]], [1, 1], False),  # beside the object
        ([], [], False),
    ],
)
def test_each_detection_has_to_find_an_object(boxes, classes, right):
    seen = Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(classes, dtype=torch.long))
    truth = (torch.tensor([OBJECT]), torch.tensor([1]), torch.zeros(0, 4))
    assert correct_images([seen], [truth], 0.5).tolist() == [right]


def test_no_images_at_all():
    empty = torch.zeros(0, UNITS)
    seen = seen_units(torch.zeros(0, UNITS, CLASSES), empty.bool(), None, 0.3)
    assert correct_images(seen, [], 0.5).shape == (0,)
