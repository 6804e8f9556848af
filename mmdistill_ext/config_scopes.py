"""Lets ``mmseg::``, ``mmdet::`` and ``mmdistill_ext::`` be used in ``_base_``.

Two things in mmengine stand in the way. It maps the scope of a config to the name of a
*distribution* such as ``mmsegmentation``, while the maintained forks have other names
(``onedl-mmsegmentation``); the name of the module works everywhere. And it marks a config from
``mmdistill_ext::`` to be built in that scope, while the configs of this package are written in the
scope of their framework, with the types of this package named in full.

Both have to be mended before a config is parsed, so before its ``custom_imports``: our tools import
this package first, ``python -m mmdistill_ext SCRIPT`` does it for the scripts of others.
"""

from functools import wraps

OWN = 'mmdistill_ext'
# Names of modules, not of distributions. The last one is a submodule: `get_installed_path` of
# mmengine 0.10.7 looks for an editable install in the wrong folder if given the package's name.
MODULES = {'mmseg': 'mmseg', 'mmdet': 'mmdet', OWN: f'{OWN}.registry'}


def mend_scopes() -> None:
    """Let mmengine's configs find those of the three packages; a second time changes nothing."""
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.update(MODULES)
    find = Config._get_cfg_path
    if getattr(find, '__wrapped__', None) is not None:
        return

    @wraps(find)
    def find_without_own_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = find(cfg_path, filename)
        return path, None if scope == OWN else scope

    Config._get_cfg_path = staticmethod(find_without_own_scope)
