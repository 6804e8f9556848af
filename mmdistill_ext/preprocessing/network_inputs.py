"""The input of each of several networks, from one batch of the loader (COL-6)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor
from torch import nn

from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.preprocessing.padding import Padding, padded_as

GEOMETRY = 'size', 'size_divisor', 'pad_size_divisor', 'batch_augments'
"""What decides the size of a batch, in the configs of data preprocessors."""


class NetworkInputs(nn.Module):
    """Runs the networks' data preprocessors; those configured alike share one run (COL-6).

    Images have any number of channels. Where there is a view for each network, the batch says so:
    its ``inputs`` are a dict of the networks' images, as
    :class:`~mmdistill_ext.transforms.MakeViews` makes them. Labels are the same for all. All
    preprocessors start from the same random state, so that they draw the same (the size of a batch,
    say), and pad to a size that suits all networks.

    Args:
        networks: Name -> network.
        configs: Name -> config of its preprocessor.

    Raises:
        ValueError: Networks have other ``batch_augments``.
    """

    def __init__(self, networks: Mapping[str, nn.Module], configs: Mapping[str, dict]) -> None:
        super().__init__()
        self.preprocessors: dict[str, BaseDataPreprocessor] = {
            name: network.data_preprocessor for name, network in networks.items()
        }  # in a dict, so that they are modules of their networks only
        self.names = list(networks)
        self.leads = {
            name: next(other for other in self.names if configs[other] == configs[name])
            for name in self.names
        }
        self._had_views = False
        augments = {name: (configs[name] or {}).get('batch_augments') for name in self.names}
        if any(augment != augments[self.names[0]] for augment in augments.values()):
            raise ValueError(
                '`students` should have the same `data_preprocessor.batch_augments`: the networks '
                f'are compared place by place of one image. Found {augments}.'
            )

    def forward(
        self, data: dict, training: bool = False, compared: bool | None = None
    ) -> dict[str, dict]:
        """Preprocess a batch of the loader.

        Args:
            data: ``inputs``, images ``(C, H, W)`` or a dict of those of each network, and
                ``data_samples``.
            training: As for any preprocessor.
            compared: The networks' units are going to be compared, so that images need one size; by
                default when training.

        Returns:
            ``inputs`` and ``data_samples``, each name -> that network's.

        Raises:
            ValueError: There are views of other networks, or the images of two networks have
                different sizes.
        """
        views = self._views(data['inputs'], training)
        sources = {name: self.leads[name] if views is None else name for name in self.names}
        compared = training if compared is None else compared
        paddings = {name: Padding.of(self.preprocessors[name], training) for name in self.names}
        if compared:
            paddings = dict.fromkeys(paddings, Padding.common(paddings.values()))
        *others, final = dict.fromkeys(sources.values())
        batches = {}
        for name in (*others, final):
            batch = dict(data) if views is None else {**data, 'inputs': views[name]}
            preprocessor = self.preprocessors[name]
            with padded_as(preprocessor, paddings[name], training):
                if name == final:
                    batches[name] = preprocessor(batch, training)
                    break
                # copies: a preprocessor pads the labels of the samples in place
                batch['data_samples'] = deepcopy(data.get('data_samples'))
                with isolated_rng():
                    batches[name] = preprocessor(batch, training)
        if compared:
            _check_sizes(batches)
        return {
            key: {name: batches[source].get(key) for name, source in sources.items()}
            for key in ('inputs', 'data_samples')
        }

    def _views(self, inputs: Any, training: bool) -> Mapping[str, list] | None:
        """The images of each network; None where all share them."""
        has_views = isinstance(inputs, Mapping)
        if has_views and set(inputs) != set(self.names):
            raise ValueError(
                f'`MakeViews.views` should be those of `students`: {sorted(self.names)}. Found '
                f'{sorted(inputs)}.'
            )
        if training and self._had_views and not has_views:
            print_log(
                'From this batch on all networks see the same image: the pipeline has no MakeViews '
                'any more (see `PipelineSwitchHook.switch_pipeline`).',
                logger='current',
                level=logging.WARNING,
            )
        if training:
            self._had_views = has_views
        return inputs if has_views else None


def _check_sizes(batches: Mapping[str, dict]) -> None:
    """Refuse batches whose pixels do not lie on each other."""
    found = {}
    for name, batch in batches.items():
        samples = batch.get('data_samples') or ()
        shapes = [tuple(sample.metainfo.get('img_shape', ()))[:2] for sample in samples]
        found[name] = tuple(batch['inputs'].shape[2:]), shapes
    first, *others = found.values()
    if any(sizes != first for sizes in others):
        raise ValueError(
            'The networks should see images of one size: `students.<name>.data_preprocessor` '
            f'should agree in {", ".join(GEOMETRY)}. Found {found}, as batch and images in it.'
        )
