"""Views of one image for several networks (COL-6)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mmengine.dataset import Compose

from mmdistill_ext.registry import TRANSFORMS
from mmdistill_ext.transforms.probe import PlaceLabels, find_geometry
from mmdistill_ext.transforms.unchanged import changed_keys, snapshot


@TRANSFORMS.register_module()
class MakeViews:
    """Makes a view of the image for each network: the same geometry, another appearance (COL-6).

    It stands last in a pipeline, in the place of the transform that packs, which it is given. What
    it returns says by name what each network gets: ``inputs`` is a dict of the networks' images.

    Transforms of a view may change the look of the image only (its colours, its number of channels,
    occlusions), not where things are. All of them are tried on probes when the pipeline is built,
    see :func:`~mmdistill_ext.transforms.probe.find_geometry`. In training they are given, instead
    of the label map, one that no move leaves as it is, and are refused when it or another label
    changes.

    Args:
        views: Name of each network -> transforms of its view. No transforms: the image as it is.
        pack: The transform that packs, such as ``dict(type='PackSegInputs')``.

    Raises:
        ValueError: There are fewer than two views, nothing packs them, or a transform changes more
            than the look.
    """

    def __init__(
        self, views: dict[str, list[dict | Callable]], pack: dict | Callable | None = None
    ) -> None:
        if not isinstance(views, dict) or len(views) < 2:
            raise ValueError(
                '`MakeViews.views` should name the transforms of two networks or more, e.g. '
                f"dict(a=[dict(type='PhotoMetricDistortion')], b=[]). Found {views!r}."
            )
        if not (callable(pack) or isinstance(pack, dict)):
            raise ValueError(
                '`MakeViews.pack` should be the transform that packs the views, e.g. '
                f"dict(type='PackSegInputs'), which MakeViews stands in the place of. Found {pack}."
            )
        self.views = {name: Compose(transforms) for name, transforms in views.items()}
        self.pack = Compose([pack])
        self._places = PlaceLabels()
        for name, view in self.views.items():
            self._check(name, find_geometry(view))

    @property
    def names(self) -> list[str]:
        """The networks' names."""
        return list(self.views)

    def __call__(self, results: dict) -> dict:
        """Pack the image ``img`` ``(H, W, C)`` once for each network.

        Returns:
            What the packing transform gives, with ``inputs`` a dict: name of a network -> its view
            ``(C, H, W)``.
        """
        packed = {
            name: self.pack({**results, 'img': self._look(name, view, results)})
            for name, view in self.views.items()
        }
        inputs = {name: one['inputs'] for name, one in packed.items()}
        return {**next(iter(packed.values())), 'inputs': inputs}

    def _look(self, name: str, view: Compose, results: dict) -> np.ndarray:
        """The image of one view, ``(H, W, C)``."""
        if not view.transforms:
            return results['img']
        fields = [key for key in results.get('seg_fields', ()) if key != 'gt_seg_map']
        given = {
            **results,
            'img': results['img'].copy(),
            'gt_seg_map': self._places(*results['img'].shape[:2]),
            'seg_fields': [*fields, 'gt_seg_map'],
        }
        before = snapshot(given)  # copies: some transforms work in place
        try:
            after = view(given)
        except Exception as error:
            raise ValueError(
                f'`MakeViews.views.{name}` should be transforms of one image and its labels. Found '
                f'{view.transforms}, which failed with {error!r}.'
            ) from error
        self._check(name, 'the image itself: it is dropped' if after is None else '')
        self._check(name, ', '.join(changed_keys(before, after)))
        return after['img']

    def _check(self, name: str, changed: str | None) -> None:
        if changed:
            raise ValueError(
                f'`MakeViews.views.{name}` should change the look of the image only: the networks '
                'are compared pixel by pixel. Put transforms of its geometry or its labels before '
                f'MakeViews. Found a change of {changed}.'
            )

    def __repr__(self) -> str:
        """Name, views and packing transform."""
        return f'{type(self).__name__}(views={self.views}, pack={self.pack.transforms[0]})'
