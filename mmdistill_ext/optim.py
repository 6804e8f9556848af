"""One optimizer for each of several networks (COL-5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict, build_optim_wrapper
from torch import Tensor, nn

from mmdistill_ext.error_keys import errors_of_part
from mmdistill_ext.registry import OPTIM_WRAPPER_CONSTRUCTORS


class PerNetworkOptimWrapper(OptimWrapperDict):
    """Optimizer wrappers that share one loss: one backward pass, then a step of each (COL-5)."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter the contexts (autocast, no DDP synchronisation) of all wrappers."""
        with ExitStack() as stack:
            for wrapper in self.values():
                stack.enter_context(wrapper.optim_context(model))
            yield

    def update_params(
        self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None
    ) -> None:
        """Go backward once, then let every wrapper step that is due (COL-5).

        Wrappers that accumulate gradients are due every ``accumulative_counts`` calls.
        """
        first, *others = self.values()
        first.backward(first.scale_loss(loss))
        for wrapper in others:
            # `backward` increments this; do it for wrappers whose backward is skipped.
            wrapper._inner_count += 1
            if isinstance(wrapper, AmpOptimWrapper):
                # `GradScaler` creates its scale lazily in `scale()`.
                wrapper.loss_scaler.scale(loss.detach())
        for wrapper in self.values():
            if wrapper.should_update():
                wrapper.step(**(step_kwargs or {}))
                wrapper.zero_grad(**(zero_kwargs or {}))

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Initialise the counts of gradient accumulation of all wrappers."""
        for wrapper in self.values():
            wrapper.initialize_count_status(model, cur_iter, max_iters)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PerNetworkOptimWrapperConstructor:
    """Builds an optimizer wrapper for each network of a ``CollaborativeDistiller`` (COL-5).

    Args:
        optim_wrapper_cfg: Name of each network -> its optimizer wrapper's config, as
            ``optim_wrapper`` is for one model. ``accumulative_counts``, AMP, its ``dtype`` and a
            fixed ``loss_scale`` must be the same in all.
        paramwise_cfg: None; each network's config may have one inside.

    Raises:
        ValueError: The names are not the networks', or the wrappers cannot share a backward pass.

    Example:
        >>> optim_wrapper = dict(  # in a config
        ...     _delete_=True,
        ...     constructor='mmdistill_ext.PerNetworkOptimWrapperConstructor',
        ...     a=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        ...     b=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4)),
        ... )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.configs = dict(optim_wrapper_cfg)
        if paramwise_cfg is not None:
            raise ValueError(
                "`optim_wrapper.paramwise_cfg` should be inside of each network's own config. "
                f'Found {paramwise_cfg!r} beside them.'
            )

    def __call__(self, model: BaseModel) -> PerNetworkOptimWrapper:
        """Build the wrappers of all networks.

        Raises:
            ValueError: The names are not the networks', or the wrappers cannot share a backward
                pass.
        """
        model = model.module if is_model_wrapper(model) else model
        networks = dict(getattr(model, 'students', {}))
        if set(self.configs) != set(networks):
            hint = " (`--amp` is for one optimizer: here each network's config has its own `type`)"
            raise ValueError(
                '`optim_wrapper` should have a config for each of the networks '
                f'{sorted(networks)}. Found {sorted(self.configs)}'
                f'{hint if self.configs.get("type") == "AmpOptimWrapper" else ""}.'
            )
        wrappers = {}
        for name, network in networks.items():
            with errors_of_part(f'optim_wrapper.{name}'):
                wrappers[name] = build_optim_wrapper(network, self.configs[name])
        _check_alike(wrappers)
        for name, wrapper in wrappers.items():
            if wrapper.clip_grad_kwargs:
                wrapper.grad_name = f'{name}/{wrapper.grad_name}'  # a scalar of the log for each
        return PerNetworkOptimWrapper(**wrappers)


def _check_alike(wrappers: dict[str, OptimWrapper]) -> None:
    for what, values in (
        ('type', {name: type(wrapper).__name__ for name, wrapper in wrappers.items()}),
        ('accumulative_counts', {name: w._accumulative_counts for name, w in wrappers.items()}),
        ('dtype', {name: getattr(w, 'cast_dtype', None) for name, w in wrappers.items()}),
    ):
        if len(set(values.values())) > 1:
            raise ValueError(
                f'`optim_wrapper.<network>.{what}` should be the same for all networks: they share '
                f'one backward pass. Found {values}.'
            )
    scalers = [w for w in wrappers.values() if isinstance(w, AmpOptimWrapper)]
    scales = {w._scale_update_param for w in scalers}
    if scalers and (scales == {None} or len(scales) > 1):
        raise ValueError(
            '`optim_wrapper.<network>.loss_scale` should be one fixed number for all networks: '
            'scales that move on their own would part. For dynamic scaling use one optimizer with '
            "`paramwise_cfg=dict(custom_keys={'students.a': dict(lr_mult=...)})`. Found "
            f'{[w.loss_scaler.state_dict() for w in scalers]}.'
        )
