"""Views of one image for several networks (COL-6)."""

from __future__ import annotations

import numpy as np
from mmengine.dataset import Compose

from mmdistill_ext.registry import TRANSFORMS

VALUES = ('flip', 'flip_direction', 'img_shape')
LABELS = (
    'gt_seg_map',
    'gt_bboxes',
    'gt_bboxes_labels',
    'gt_masks',
    'gt_ignore_flags',
    'homography_matrix',
)
"""What has to be the same in every view, in new objects or not (as Albu's are)."""


def as_array(values: object) -> np.ndarray:
    """Masks, boxes or labels as numbers."""
    masks = getattr(values, 'masks', None)
    if isinstance(masks, list):  # of polygons
        return np.concatenate([np.empty(0), *(xy for polygons in masks for xy in polygons)])
    if masks is not None:
        return masks
    return values.numpy() if hasattr(values, 'numpy') else np.asarray(values)


def same(found: object, kind: type, before: np.ndarray) -> bool:
    """Whether these are labels of that kind and those numbers, to a hundredth of a pixel."""
    if type(found) is not kind:
        return False
    found = as_array(found)
    if found.dtype.kind == 'f' and found.shape == before.shape:
        return np.allclose(found, before, rtol=0, atol=0.01)
    return np.array_equal(found, before)


@TRANSFORMS.register_module()
class MakeViews:
    """Makes a view of the image for each network: the same geometry, another appearance.

    It stands at the end of the pipeline, before the image is packed. A change of the geometry is
    seen from the labels, which have to stay where they were. The views are stacked along the
    channels, ``(H, W, 3 * N)``; the distiller hands each network its own.

    Args:
        views: Name of each network -> transforms of its view, in the order of the distiller's
            ``students``. No transforms: the image as it is; with none at all it is repeated.

    Raises:
        ValueError: There are fewer than two views, or a transform changes more than the look.
    """

    def __init__(self, views: dict[str, list[dict]]) -> None:
        if not isinstance(views, dict) or len(views) < 2:
            raise ValueError(
                '`MakeViews.views` should name the transforms of two networks or more, e.g. '
                f"dict(a=[dict(type='PhotoMetricDistortion')], b=[]). Found {views!r}."
            )
        self.views = {name: Compose(transforms) for name, transforms in views.items()}

    @property
    def names(self) -> list[str]:
        """The networks' names."""
        return list(self.views)

    def __call__(self, results: dict) -> dict:
        """Replace ``img`` ``(H, W, 3)`` by the views ``(H, W, 3 * N)``."""
        images = []
        labels = {}
        for key in LABELS:  # copied: some transforms work in place
            value = results.get(key)
            labels[key] = type(value), as_array(value).copy()
        for name, transforms in self.views.items():
            if not transforms.transforms:
                images.append(results['img'])
                continue
            found = transforms({**results, 'img': results['img'].copy()})
            if found is None:
                raise ValueError(
                    f'`MakeViews.views.{name}` should not drop an image. Found transforms that did.'
                )
            changed = [key for key in VALUES if found.get(key) != results.get(key)]
            changed += [key for key, old in labels.items() if not same(found.get(key), *old)]
            if changed or found['img'].shape != results['img'].shape:
                raise ValueError(
                    f'`MakeViews.views.{name}` should change the look of the image only: the '
                    'networks are compared pixel by pixel. Put transforms of its geometry before '
                    f'MakeViews. Found a change of {", ".join(changed) or "the shape of `img`"}.'
                )
            images.append(found['img'])
        results['img'] = np.concatenate(images, axis=2)
        return results

    def __repr__(self) -> str:
        """Name and views."""
        return f'{type(self).__name__}(views={self.views})'
