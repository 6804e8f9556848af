"""The few lines that bridge releases of the MM stack; run once, when the package is imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mmengine
import numpy as np
import torch
from mmengine.device import get_device
from mmengine.logging import HistoryBuffer

from mmdistill_ext.config_scopes import mend_scopes


def mend(change: Callable[[], None], purpose: str) -> None:
    """Change something in mmengine; where that is not possible, warn and go on without.

    Args:
        change: Makes the change; called once.
        purpose: What does not work without it, for the warning.
    """
    try:
        change()
    except Exception as error:  # whatever an unknown release answers, imports go on
        warnings.warn(
            f'mmengine {mmengine.__version__} is not known to mmdistill_ext: {purpose} may not '
            f'work ({type(error).__name__}: {error}).',
            stacklevel=2,
        )


def has_framework(name: str) -> bool:
    """Whether ``mmseg`` or ``mmdet`` is installed, without importing it."""
    return find_spec(name) is not None


def require_framework(name: str, why: str) -> None:
    """Raise an ``ImportError`` that says what to install when a framework is missing."""
    package = {'mmseg': 'mmsegmentation', 'mmdet': 'mmdetection'}[name]
    if not has_framework(name):
        raise ImportError(
            f'{why} needs `{name}`, which is not installed: install `onedl-{package}` '
            f'(or `{"mmdet" if name == "mmdet" else package}` of OpenMMLab).'
        )


def _history_getattr(owner: object, name: str) -> Any:
    """``getattr`` as a checkpoint may use it: for the statistics of ``HistoryBuffer`` only."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(owner, name)
    raise TypeError(f'A checkpoint may not read `{owner!r}.{name}`.')


def allow_training_checkpoints() -> None:
    """Let mmengine's own training checkpoints load with ``weights_only=True``.

    Stock mmengine 0.10.7 cannot read them on PyTorch >= 2.6, the maintained fork falls back to
    unpickling anything. What they hold besides tensors is allowed here, for the process; the fork
    removes its own, overlapping list after each load, so this is called before each load of this
    package.
    """
    core = getattr(np, '_core', None) or np.core
    rebuild = [core.multiarray._reconstruct, core.multiarray.scalar]
    dtypes = {type(np.dtype(code)) for code in '?bBhHiIlLqQefd'}
    allowed = [HistoryBuffer, slice, np.ndarray, np.dtype, *rebuild, *dtypes]
    if tuple(int(part) for part in torch.__version__.split('.')[:2]) >= (2, 6):  # (object, name)
        allowed += [(call, f'numpy.core.multiarray.{call.__name__}') for call in rebuild]
        allowed += [(_history_getattr, 'builtins.getattr')]
    torch.serialization.add_safe_globals(allowed)


def mend_cpu_distributed() -> None:
    """Let ``--launcher pytorch`` start processes over gloo where there is no accelerator.

    mmengine's initialisation calls ``torch.cuda.set_device`` whatever the backend is.
    """
    from mmengine.dist import utils as dist_utils

    if get_device() != 'cpu':
        return

    def init_dist_pytorch(backend: str, init_backend: str = 'torch', **kwargs: Any) -> None:
        torch.distributed.init_process_group(backend=backend, **kwargs)

    dist_utils._init_dist_pytorch = init_dist_pytorch


mend(mend_scopes, '`_base_` of another package')
mend(allow_training_checkpoints, 'loading of training checkpoints')
mend(mend_cpu_distributed, '`--launcher pytorch` without a GPU')
