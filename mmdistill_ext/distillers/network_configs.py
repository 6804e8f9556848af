"""The configs of several networks that learn together, and what the networks may be called."""

from __future__ import annotations

from mmengine.config import ConfigDict
from mmengine.model import ModuleDict

from mmdistill_ext.distillers.build import resolve_model_cfg
from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.losses.collaboration_loss import ENSEMBLE

RESERVED = ('best', 'type', 'constructor', 'optimizer', 'paramwise_cfg')
"""What a network cannot be called, because configs and options mean something else by it."""


def network_configs(students: dict, data_preprocessor: dict | None) -> dict[str, ConfigDict]:
    """The config of each network, sorted by name (COL-1).

    The order of a config's keys means nothing: the config that a run dumps has another one.

    Args:
        students: Name -> network: a model dict, a config path, or ``'mmseg::pspnet/...py'``.
        data_preprocessor: For networks that name none.

    Raises:
        ValueError: There are fewer than two networks, or one cannot have its name.
        FileNotFoundError: A config does not exist.
    """
    _check_names(students)
    configs = {
        name: resolve_model_cfg(spec, f'students.{name}') for name, spec in sorted(students.items())
    }
    if data_preprocessor is not None:
        for cfg in configs.values():
            cfg.setdefault('data_preprocessor', data_preprocessor)
    return configs


def find_reference(reference: str | None, names: list[str]) -> str:
    """The network whose target assignment and sizes the others are compared by.

    Args:
        reference: Its name; None for the first by name.
        names: Names of all networks.

    Raises:
        ValueError: There is no such network.
    """
    reference = names[0] if reference is None else reference
    check_choice('reference', reference, tuple(names))
    return reference


def _check_names(students: dict) -> None:
    if not isinstance(students, dict) or len(students) < 2:
        raise ValueError(
            '`students` should be a dict of two networks or more, such as dict(a=..., b=...): one '
            f'alone has nobody to learn from. Found {students if students else "none"!r}.'
        )
    taken = (ENSEMBLE, *RESERVED, *dir(ModuleDict()))
    for name in students:
        if not isinstance(name, str) or not name.isidentifier() or 'loss' in name or name in taken:
            raise ValueError(
                '`students` should have names that are identifiers, without "loss" in them, and '
                f'not those of the ensemble or of PyTorch. Found {name!r}.'
            )
