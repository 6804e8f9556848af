import numpy as np
import torch
from mmdet.structures.mask import BitmapMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from mmdistill_ext.visualization.boxes import GAP, compare_boxes
from tests import tiny_det

PANELS = ('label', 'student', 'teacher')
PALETTE = [(0, 114, 178), (213, 94, 0), (0, 158, 115)]


def panels_of(picture: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the three panels of a picture, captions and gaps cut off."""
    height, width = size
    return {
        name: picture[-height:, i * (width + GAP) :][:, :width] for i, name in enumerate(PANELS)
    }


def masked(boxes: list, masks: np.ndarray, scores: list | None = None) -> InstanceData:
    found = InstanceData(
        bboxes=torch.tensor(boxes).reshape(-1, 4).float(), labels=torch.arange(len(boxes))
    )
    if scores is None:
        found.masks = BitmapMasks(masks.astype(np.uint8), *masks.shape[1:])
    else:
        found.scores = torch.tensor(scores)
        found.masks = torch.from_numpy(masks)
    return found


def test_instance_masks_are_drawn():
    """Labels have mmdet's masks, predictions tensors; a low score hides box and mask."""
    image = np.full((60, 160, 3), 128, np.uint8)
    masks = np.zeros((2, 60, 160), bool)
    masks[0, 20:40, 15:35] = masks[1, 30:50, 110:130] = True
    boxes = [[10, 15, 40, 45], [105, 25, 135, 55]]
    panels = dict(
        label=masked(boxes, masks),
        student=masked(boxes, masks, [0.9, 0.1]),
        teacher=masked([], masks[:0], []),
    )
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(
        classes=tiny_det.CLASSES, palette=[(0, 114, 178), (213, 94, 0), (0, 158, 115)]
    )
    found = panels_of(compare_boxes(visualizer, image, panels, 0.3), image.shape[:2])
    assert (found['label'][masks.any(0)] != 128).any(1).all()
    assert (found['student'][masks[0]] != 128).any(1).all()
    assert (found['student'][:, 100:] == 128).all()
    assert (found['teacher'] == 128).all()


def test_no_labels_at_all_leave_the_image():
    """A pipeline without LoadAnnotations packs instances without boxes."""
    image = np.full((40, 60, 3), 90, np.uint8)
    found = compare_boxes(DetLocalVisualizer(), image, dict(label=InstanceData()))
    assert np.array_equal(found[-40:], image)
