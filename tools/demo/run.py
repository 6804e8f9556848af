"""The demo: a student alone, with plain distillation, a selective teacher (SEL), a fit loss (FIT).

Makes digit scenes, trains an imperfect teacher and four equal students, exports and tests them,
and writes one page, ``work_dirs/demo/index.html``. Every step is a command that a user would type;
its output is in ``logs/``. A finished step is not run again unless its command, a config or a
step before it has changed.

Example:
    python tools/demo/run.py            # minutes on 2 cores
    python tools/demo/run.py --fresh    # everything anew
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from page import write_page
from steps import Step, StepError, run_steps

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path('configs', 'demo')
PLAIN = ('teacher', 'student')
DISTILLED = ('student_kd', 'student_sel', 'student_fit')
QUICK = (
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=4',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.indices=4',
)
QUICK_FIT = ('custom_hooks.0.interval=1', 'custom_hooks.0.begin=0')


def plan(out: Path, quick: bool = False) -> list[Step]:
    """List the steps of the demo, in the order of urgency. Paths are relative to the project.

    Args:
        out: Folder of everything that the demo writes.
        quick: A handful of scenes and iterations, only to see that everything runs.

    Returns:
        The steps, with what each needs.
    """
    num_train, num_val = (8, 4) if quick else (480, 120)
    data = [f'{name}_dataloader.dataset.data_root={out}/data' for name in ('train', 'val', 'test')]
    data += QUICK if quick else []
    iters = 4 if quick else Config.fromfile(CONFIGS / 'student.py').train_cfg.max_iters
    teacher = [f'model.teacher.checkpoint={out}/runs/teacher/iter_{iters}.pth']

    def step(kind: str, name: str, tool: str, args: list, needs: list, options: Sequence = ()):
        command = [sys.executable, f'tools/{tool}', *args]
        command += ['--cfg-options', *data, *options]
        return Step(f'{kind} {name}', [str(part) for part in command], needs)

    def train(name: str) -> Step:
        args = [CONFIGS / f'{name}.py', '--work-dir', out / 'runs' / name]
        needs = ['scenes'] if name in PLAIN else ['train teacher']
        options = [] if name in PLAIN else teacher
        options = [*options, *(QUICK_FIT if quick and name == 'student_fit' else ())]
        return step('train', name, 'train.py', args, needs, options)

    def export(name: str) -> Step:
        args = [CONFIGS / f'{name}.py', out / 'runs' / name / f'iter_{iters}.pth']
        args.append(out / 'exports' / name)
        return step('export', name, 'export_student.py', args, [f'train {name}'], teacher)

    def test(name: str) -> Step:
        if name in PLAIN:
            args = [CONFIGS / f'{name}.py', out / 'runs' / name / f'iter_{iters}.pth']
        else:
            args = [out / 'exports' / name / file for file in ('student.py', 'student.pth')]
        args += ['--work-dir', out / 'tests' / name, '--out', out / 'predictions' / name]
        return step(
            'test', name, 'test.py', args, [f'{"train" if name in PLAIN else "export"} {name}']
        )

    scenes = [sys.executable, 'tools/demo/digit_scenes.py', out / 'data', '--seed', 0]
    scenes += ['--num-train', num_train, '--num-val', num_val]
    sel = 'student_sel'
    masks = [CONFIGS / f'{sel}.py', out / 'exports' / sel / 'student.pth', out / 'contrast']
    return [
        Step('scenes', [str(part) for part in scenes], []),
        *(train(name) for name in ('teacher', *DISTILLED, 'student')),
        *(export(name) for name in DISTILLED),
        step('contrast', sel, 'contrast_masks.py', masks, [f'export {sel}'], teacher),
        *(test(name) for name in (*DISTILLED, *PLAIN)),
    ]


def fingerprint() -> str:
    """Tell the demo's configs from any other version of them."""
    files = [*sorted(CONFIGS.glob('*.py')), Path('configs/_base_/datasets/digit_scenes.py')]
    return hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:16]


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description='Train on digit scenes and compare on one page')
    parser.add_argument('--out', type=Path, default=Path('work_dirs', 'demo'), help='folder')
    parser.add_argument('--fresh', action='store_true', help='run finished steps again')
    parser.add_argument('--quick', action='store_true', help='4 iterations, to see that it runs')
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument(
        '--jobs', type=int, default=jobs, help='steps at a time (default: %(default)s)'
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'`--jobs` should be >= 1. Found {args.jobs}.')
    out = args.out.resolve()
    os.chdir(ROOT)
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    if args.fresh:
        for name in (
            'contrast',
            'data',
            'exports',
            'logs',
            'predictions',
            'runs',
            'steps',
            'tests',
        ):
            shutil.rmtree(out / name, ignore_errors=True)
    try:
        records = run_steps(plan(out, args.quick), out, fingerprint(), args.jobs)
    except StepError as error:
        sys.exit(f'\n{error}')
    except KeyboardInterrupt:
        sys.exit('\nStopped. Finished steps are kept: call again to go on.')
    page = write_page(out, records)
    print(f'\nThe page: {page.resolve()}')


if __name__ == '__main__':
    main()
