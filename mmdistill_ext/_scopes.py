"""Lets ``mmseg::``, ``mmdet::`` and ``mmdistill_ext::`` be used in ``_base_``, with any tool.

Two things in mmengine stand in the way. It maps the scope of a config to the name of a
*distribution* such as ``mmsegmentation``, while the maintained forks have other names
(``onedl-mmsegmentation``); the name of the module works everywhere. And it marks a config from
``mmdistill_ext::`` to be built in that scope, while the configs of this package are written in the
scope of their framework, with the types of this package named in full.

Both are mended before a config is parsed, so before its ``custom_imports``: the wheel installs this
file a second time, as ``_mmdistill_ext_scopes``, with a ``.pth`` line that starts it with Python.
It imports nothing until mmengine itself is imported.
"""

import sys
from collections.abc import Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

OWN = 'mmdistill_ext'
# Names of modules, not of distributions. The last one is a submodule: `get_installed_path` of
# mmengine 0.10.7 looks for an editable install in the wrong folder if given the package's name.
MODULES = {'mmseg': 'mmseg', 'mmdet': 'mmdet', OWN: f'{OWN}.registry'}
TARGET = 'mmengine.config.config'


def mend(config_module: ModuleType) -> None:
    """Mend a loaded :mod:`mmengine.config.config`; a second time changes nothing."""
    packages = sys.modules['mmengine.config.utils'].MODULE2PACKAGE
    packages.update(MODULES)
    config = config_module.Config
    find = config._get_cfg_path
    if getattr(find, '__wrapped__', None) is not None:
        return

    @wraps(find)
    def find_without_own_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = find(cfg_path, filename)
        return path, None if scope == OWN else scope

    config._get_cfg_path = staticmethod(find_without_own_scope)


class MendOnImport:
    """Finder that mends mmengine's configs when they are imported, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find the module; then mend it right after its execution."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_mend(module: ModuleType) -> None:
            execute(module)
            mend(module)

        spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]  # of this one
        return spec


def start() -> None:
    """Wait for mmengine; called by the ``.pth`` line at the start of Python."""
    if TARGET not in sys.modules:
        sys.meta_path.insert(0, MendOnImport())
