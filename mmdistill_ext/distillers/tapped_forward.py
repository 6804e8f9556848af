"""Run a model, without its losses, until the wanted calls have been recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdistill_ext.compat import has_framework
from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Call, Taps, wrapped

FEATURES = 'extract_feat'
AUXILIARY = 'auxiliary_head'


@torch.no_grad()
def tapped_forward(
    model: nn.Module,
    inputs: Tensor,
    data_samples: list | None,
    wanted: Mapping[str, int | None],
    to_the_end: bool = True,
) -> dict[str, list[Call]]:
    """Record calls in a forward that predicts, without gradient.

    The forward ends as soon as all wanted calls were seen. Auxiliary heads of segmenters, which
    take no part in it, are called on the model's features.

    Args:
        model: A model of the MM stack, or any module that takes a batch of images.
        inputs: ``(B, C, H, W)``, preprocessed for the model.
        data_samples: The batch's data samples, for models that read their sizes.
        wanted: Dotted path -> number of its calls in a forward; None when it is not known, then the
            forward runs to its end.
        to_the_end: Otherwise the forward may fail once every path has been called.

    Returns:
        Path -> its calls, in order; an empty list for what did not run.
    """
    paths = {path: path for path in wanted}
    later = [path for path in wanted if path.split('.')[0] == AUXILIARY]
    stop_after = {path: count for path, count in wanted.items() if path not in later}
    if later:
        paths[FEATURES], stop_after[FEATURES] = FEATURES, 1
    known = {path: count for path, count in stop_after.items() if count is not None}
    all_known = len(known) == len(stop_after)
    stop = known if all_known else None
    with _all_locations(model), Taps(model, paths, stop_after=stop) as taps:
        try:
            _forward(model, inputs, data_samples)
        except Exception:  # whatever a head answers to what it does not take
            if to_the_end or not all(_is_over(taps.all(path)) for path in paths):
                raise
    calls = {path: taps.all(path) for path in paths}
    taps.clear()
    if later:
        features = calls[FEATURES][-1].output
        with Taps(model, {path: path for path in later}) as taps:
            for head in _auxiliary_heads(model, later):
                head(features)
        calls |= {path: taps.all(path) for path in later}
        taps.clear()
    return {path: calls[path] for path in wanted}


def _is_over(calls: list[Call]) -> bool:
    """Whether something was called, and the last call has returned."""
    return bool(calls) and calls[-1].output is not None


def features_in_training(model: nn.Module) -> AbstractContextManager:
    """Let backbone and neck give what they give in training; their layers stay as they are.

    Some backbones of segmenters (DDRNet, PIDNet) then give maps for auxiliary losses too.
    """
    parts = (getattr(model, name, None) for name in ('backbone', 'neck'))
    return training_flags([part for part in parts if isinstance(part, nn.Module)])


def most_calls(wanted: Iterable[Mapping[str, int | None]]) -> dict[str, int | None]:
    """What several want together: of each path the largest number of calls; None is any number."""
    merged: dict[str, int | None] = {}
    for path, count in ((path, n) for part in wanted for path, n in part.items()):
        known = merged.get(path, 0)
        merged[path] = None if known is None or count is None else max(known, count)
    return merged


def _forward(model: Any, inputs: Tensor, data_samples: list | None) -> None:
    if hasattr(model, 'encode_decode') and data_samples:
        # Of mmseg; with mode='tensor' heads that want data samples (Mask2Former) fail.
        model.encode_decode(inputs, [sample.metainfo for sample in data_samples])
    elif isinstance(model, BaseModel):
        model(inputs, data_samples, mode='tensor')
    else:
        model(inputs)


@contextmanager
def _all_locations(model: nn.Module) -> Iterator[None]:
    """Let heads with guided anchors predict for all locations, as they do while they train.

    In eval mode they skip locations, which mmcv can do for one image at a time, and on GPUs only.
    """
    with ExitStack() as stack:
        for head in _guided_heads(model):

            def wrap(single: Callable, head: nn.Module = head) -> Callable:
                def forward_single(*args: Any) -> Any:
                    with training_flags([head]):
                        return single(*args)

                return forward_single

            stack.enter_context(wrapped(head, 'forward_single', wrap))
        yield


def _guided_heads(model: nn.Module) -> list[nn.Module]:
    if not has_framework('mmdet'):
        return []
    from mmdet.models.dense_heads import GuidedAnchorHead

    return [module for module in model.modules() if isinstance(module, GuidedAnchorHead)]


def _auxiliary_heads(model: nn.Module, paths: list[str]) -> list[nn.Module]:
    """The heads that the paths lead to or into."""
    heads = getattr(model, AUXILIARY)
    if not isinstance(heads, nn.ModuleList):
        return [heads]
    return [heads[index] for index in sorted({int(path.split('.')[1]) for path in paths})]
