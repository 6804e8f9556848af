"""Lets ``mmseg::``, ``mmdet::`` and ``mmdistill_ext::`` be used in ``_base_``, with any tool.

mmengine maps the scope of a config to a *distribution*, and looks for one named ``mmsegmentation``;
the maintained forks have other names (``onedl-mmsegmentation``). The module's own name works
everywhere. It has to be there before a config is parsed, so before its ``custom_imports``: the
wheel installs this file a second time, as ``_mmdistill_ext_scopes``, with a ``.pth`` line that
starts it with Python. It imports nothing until mmengine itself is imported.
"""

import sys
from importlib.util import find_spec

SCOPES = ('mmseg', 'mmdet', 'mmdistill_ext')
TARGET = 'mmengine.config.utils'


def mend(module2package: dict) -> None:
    """Map the scopes to the names of their modules."""
    module2package.update((scope, scope) for scope in SCOPES)


class MendOnImport:
    """Finder that mends mmengine's map when mmengine is imported, once."""

    def find_spec(self, name: str, path: object = None, target: object = None):
        """Let the other finders find it; then add the mend to its execution."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_mend(module):
            execute(module)
            mend(module.MODULE2PACKAGE)

        spec.loader.exec_module = execute_and_mend
        return spec


def start() -> None:
    """Wait for mmengine; called by the ``.pth`` line at the start of Python."""
    if TARGET not in sys.modules:
        sys.meta_path.insert(0, MendOnImport())
