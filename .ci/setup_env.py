"""Make the virtual environment of one family of frameworks; leave it alone when it is right.

    python3.11 .ci/setup_env.py --family onedl --level full

Level ``basic`` has mmsegmentation and an mmcv without compiled operators (about two minutes);
level ``full`` adds mmdetection and the operators, compiled here unless pip finds a wheel of them
(its ``find-links`` included). Only the standard library is used; pip's own output goes to a log.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / '.ci' / 'constraints.txt'
FAMILIES = {'onedl': ('.venv', 'onedl-mmcv'), 'openmmlab': ('.venv-openmmlab', 'mmcv')}
LEVELS = ('basic', 'full')
BUILD_TOOLS = ('setuptools', 'wheel', 'ninja', 'psutil', 'packaging')


class SetupError(RuntimeError):
    """Something that the user has to mend, in one sentence."""


class Environment:
    """One virtual environment and what is known about it.

    Args:
        folder: Where it is or will be.
        mmcv: Name of the distribution that brings mmcv in this family.
    """

    def __init__(self, folder: Path, mmcv: str) -> None:
        self.folder, self.mmcv = folder, mmcv
        self.python = folder / 'bin' / 'python'
        self.log = folder / 'setup.log'
        self.stamp = folder / 'setup.json'
        paths = {'base': str(folder), 'platbase': str(folder)}
        self.site = Path(sysconfig.get_path('platlib', 'posix_prefix', vars=paths))

    def installed(self) -> dict[str, str]:
        """Return name -> version of what lies in the environment now."""
        found = metadata.distributions(path=[str(self.site)])
        return {dist.metadata['Name']: dist.version for dist in found}

    def operators(self) -> Path | None:
        """Return mmcv's compiled operators, ``None`` when this mmcv has none."""
        return next((self.site / 'mmcv').glob('_ext*.so'), None)

    def run(self, *command: str | Path, **variables: str) -> bool:
        """Run a command of the environment into the log; say whether it succeeded."""
        path = f'{self.python.parent}{os.pathsep}{os.environ.get("PATH", "")}'
        env = {**os.environ, 'PATH': path, 'PIP_REQUIRE_VIRTUALENV': '1', **variables}
        with self.log.open('a') as log:
            print('\n$', *command, file=log, flush=True)
            done = subprocess.run(command, stdout=log, stderr=log, env=env, cwd=ROOT)
        return done.returncode == 0

    def pip(self, *arguments: str, **variables: str) -> bool:
        """Run ``pip install`` under the constraints."""
        quiet = ('--no-input', '--disable-pip-version-check')
        command = (self.python, '-m', 'pip', 'install', *quiet, '-c', CONSTRAINTS)
        return self.run(*command, *arguments, **variables)

    def check(self, code: str) -> bool:
        """Say whether Python code runs in the environment."""
        return self.run(self.python, '-c', code)

    def must(self, succeeded: bool, what: str) -> None:
        """Raise unless a step succeeded, with the end of the log."""
        if not succeeded:
            tail = '\n'.join(self.log.read_text(errors='replace').splitlines()[-25:])
            raise SetupError(f'{tail}\n\n{what} The whole log: {self.log}')


def fingerprint() -> str:
    """Hash what decides about the content of an environment, its place included."""
    files = (ROOT / 'pyproject.toml', CONSTRAINTS, Path(__file__))
    text = b''.join([str(ROOT).encode(), *(file.read_bytes() for file in files)])
    return hashlib.sha256(text).hexdigest()


def is_ready(env: Environment, level: str) -> bool:
    """Compare the stamp of the last set-up with what is really installed."""
    try:
        stamp = json.loads(env.stamp.read_text())
    except (OSError, ValueError):
        return False
    return (
        env.python.exists()
        and stamp['fingerprint'] == fingerprint()
        and LEVELS.index(stamp['level']) >= LEVELS.index(level)
        and stamp['installed'].items() <= env.installed().items()
        and (stamp['level'] == 'basic' or env.operators() is not None)
    )


def say(text: str) -> None:
    """Print one step."""
    print(f'[setup] {text}', flush=True)


def make_venv(env: Environment) -> None:
    """Create the environment, or again when it is broken."""
    # Half of an environment is still a Python: the one below it, where nothing may be installed.
    wrong = f'sys.prefix == sys.base_prefix or sys.version_info[:2] != {sys.version_info[:2]}'
    if env.python.exists() and env.check(f'import pip, sys; sys.exit({wrong})'):
        return
    say(f'{env.folder.name}: a virtual environment of Python {sys.version.split()[0]}')
    command = (sys.executable, '-m', 'venv', '--clear', str(env.folder))
    if subprocess.run(command).returncode:
        raise SetupError(f'{sys.executable} cannot make environments (Debian: python3-venv).')


def install_mmcv(env: Environment, level: str) -> None:
    """Install mmcv as the level needs it, past its traps.

    Built in isolation it finds no torch and silently has no operators, and pip would keep that
    wheel: so its cache is neither read nor filled. Built without isolation it has them.
    """
    pattern = rf"'({re.escape(env.mmcv)}==([^']+))'"
    requirement, version = re.search(pattern, (ROOT / 'pyproject.toml').read_text()).groups()
    right = env.installed().get(env.mmcv) == version
    if right and (operators_load(env) if env.operators() else level == 'basic'):
        return
    arguments = (requirement, '--no-deps', '--no-cache-dir', '--force-reinstall')
    say(f'{requirement}: a wheel with compiled operators, if pip knows one')
    if env.pip(*arguments, '--only-binary', ':all:') and operators_load(env):
        return
    if level == 'basic':
        say(f'{requirement}: none found, so without operators (segmentation needs none)')
        built = env.pip(*arguments, '--no-binary', env.mmcv)
        env.must(built, f'{requirement} could not be installed.')
        return
    say(f'{requirement}: none found, so compiling them (10 to 20 minutes on 2 cores)')
    compile_mmcv(env, requirement, arguments)


def compile_mmcv(env: Environment, requirement: str, arguments: tuple[str, ...]) -> None:
    """Build mmcv with its operators against the torch of the environment."""
    needs = 'needs a C++17 compiler and the headers of Python (Debian: g++ and python3-dev).'
    compiler = os.environ.get('CXX', '').split()[:1] or ['c++']
    headers = Path(sysconfig.get_path('include')) / 'Python.h'
    if shutil.which(compiler[0]) is None or not headers.exists():
        raise SetupError(f'Compiling the operators of mmcv {needs}')
    jobs = os.environ.get('MAX_JOBS', str(len(os.sched_getaffinity(0))))
    variables = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs}
    if not (shutil.which('nvcc') or os.environ.get('CUDA_HOME')):
        variables['CUDA_VISIBLE_DEVICES'] = ''  # a GPU without its compiler: operators for the CPU
    flags = ('--no-build-isolation', '--no-binary', env.mmcv)
    built = env.pip(*arguments, *flags, **variables) and operators_load(env)
    env.must(built, f'Compiling the operators of {requirement} failed; it {needs}')


def operators_load(env: Environment) -> bool:
    """Say whether there are operators, built against the torch of the environment."""
    library = env.operators()
    return library is not None and env.check(f'import torch, ctypes; ctypes.CDLL({str(library)!r})')


def install(env: Environment, family: str, level: str) -> None:
    """Bring the environment to the level: torch, mmcv, the rest, then look whether it works."""
    make_venv(env)
    env.stamp.unlink(missing_ok=True)
    env.log.unlink(missing_ok=True)
    say('torch and build tools')
    env.must(env.pip('torch', *BUILD_TOOLS), 'torch could not be installed.')
    install_mmcv(env, level)
    extra = family if level == 'full' else f'{family}-seg'
    say(f'mmdistill-ext[{extra},dev]')
    flags = ('--no-build-isolation', '--only-binary', env.mmcv)  # mmcv is there: never build it now
    packages = env.pip(*flags, '-e', f'.[{extra},dev]')
    env.must(packages, 'The packages in pyproject.toml could not be installed.')
    if not env.check('import cv2'):
        say('opencv-python-headless: this machine has no libGL')
        env.pip('opencv-python-headless', '--no-deps', '--force-reinstall')
    modules = 'mmseg, mmdet, mmcv.ops' if level == 'full' else 'mmseg'
    works = env.check(f'import {modules}')
    env.must(works, f'{env.folder.name} was installed, but `import {modules}` fails in it.')
    stamp = {'fingerprint': fingerprint(), 'level': level, 'installed': env.installed()}
    env.stamp.write_text(json.dumps(stamp, indent=1))


def main() -> None:
    """Read the command line and set up what is not right yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--family', choices=FAMILIES, default='onedl')
    parser.add_argument('--level', choices=LEVELS, default='full')
    args = parser.parse_args()
    folder, mmcv = FAMILIES[args.family]
    env = Environment(ROOT / folder, mmcv)
    if is_ready(env, args.level):
        return
    start = time.monotonic()
    try:
        install(env, args.family, args.level)
    except SetupError as error:
        sys.exit(f'{error}')
    say(f'{folder} is ready ({time.monotonic() - start:.0f} s)')


if __name__ == '__main__':
    main()
