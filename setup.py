"""Adds one file to what pyproject.toml says: see mmdistill_ext/_scopes.py."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STARTUP = '_mmdistill_ext_scopes'


class BuildWithStartup(build_py):
    """Put the start-up module and its ``.pth`` line beside the package."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if self.editable_mode:  # files beside the package are not part of an editable install
            return
        self.copy_file('mmdistill_ext/_scopes.py', f'{self.build_lib}/{STARTUP}.py')
        line = f'import {STARTUP}; {STARTUP}.start()\n'
        Path(self.build_lib, f'{STARTUP}.pth').write_text(line)


setup(cmdclass={'build_py': BuildWithStartup})
