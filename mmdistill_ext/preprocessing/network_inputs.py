"""The input of each of several networks, from one batch of the loader (COL-6)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from mmdistill_ext.isolation import isolated_rng

CHANNELS = 3


class NetworkInputs(nn.Module):
    """Runs the networks' data preprocessors; those configured alike share one run (COL-6).

    Images with ``3 * N`` channels hold a view for each network, in order, as
    :class:`~mmdistill_ext.transforms.MakeViews` makes them; labels are the same for all. All
    preprocessors start from the same random state, so that they draw the same (the size of a batch,
    say).

    Args:
        networks: Name -> network.
        configs: Name -> config of its preprocessor.
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

    def forward(self, data: dict, training: bool = False) -> dict[str, dict]:
        """Preprocess a batch of the loader.

        Args:
            data: ``inputs``, images ``(3, H, W)`` or ``(3 * N, H, W)``, and ``data_samples``.
            training: As for any preprocessor.

        Returns:
            ``inputs`` and ``data_samples``, each name -> that network's.

        Raises:
            ValueError: Images have neither 3 nor ``3 * N`` channels.
        """
        views = self._views(data['inputs'])
        sources = {name: self.leads[name] if views is None else name for name in self.names}
        *others, final = dict.fromkeys(sources.values())
        batches = {}
        for name in others:  # copies: a preprocessor pads the labels of the samples in place
            batch = {**data, 'data_samples': deepcopy(data.get('data_samples'))}
            with isolated_rng():
                batches[name] = self._run(batch, name, views, training)
        batches[final] = self._run(data, final, views, training)
        return {
            key: {name: batches[source].get(key) for name, source in sources.items()}
            for key in ('inputs', 'data_samples')
        }

    def _run(self, batch: dict, name: str, views: dict | None, training: bool) -> dict:
        if views is not None:
            batch = {**batch, 'inputs': views[name]}
        return self.preprocessors[name](batch, training)

    def _views(self, images: list[Tensor]) -> dict[str, list[Tensor]] | None:
        channels = {len(image) for image in images}
        if channels == {CHANNELS}:
            return None
        if channels != {CHANNELS * len(self.names)}:
            raise ValueError(
                f'Images should have {CHANNELS} channels, or {CHANNELS * len(self.names)} with a '
                f'view for each of {self.names} (`MakeViews` in the pipeline). Found {channels}.'
            )
        return {
            name: [image[CHANNELS * place : CHANNELS * (place + 1)] for image in images]
            for place, name in enumerate(self.names)
        }
