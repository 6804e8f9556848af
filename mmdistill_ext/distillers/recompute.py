"""The losses of a network, with its activations kept or recomputed for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmdistill_ext.units.joint import shallow_copy


def network_loss(network: nn.Module, inputs: Tensor, data_samples: list) -> dict:
    """A network's own losses (COL-2); what it changes in the labels, others do not see."""
    return network(inputs, [_with_own_labels(sample) for sample in data_samples], mode='loss')


def recomputed_loss(network: nn.Module, inputs: Tensor, data_samples: list) -> dict:
    """A network's own losses (COL-2); its activations are freed now and recomputed later."""
    return checkpoint(
        network_loss,
        network,
        inputs,
        data_samples,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_kept(network)),
    )


def _with_own_labels(sample: BaseDataElement) -> BaseDataElement:
    """A data sample whose labels the network may replace (RTMDet-Ins); tensors are shared."""
    copied = shallow_copy(sample)
    for name, value in sample.items():
        if isinstance(value, BaseDataElement):
            copied.set_data({name: value.clone()})
    return copied


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm update copies of its statistics, so that recomputing counts no batch twice."""
    counting = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    kept = [dict(module._buffers) for module in counting]
    for module in counting:
        module._buffers.update(
            {name: None if x is None else x.clone() for name, x in module._buffers.items()}
        )
    try:
        yield
    finally:
        for module, buffers in zip(counting, kept, strict=True):
            module._buffers.update(buffers)
