"""The demo: a student alone, with plain distillation, a selective teacher (SEL), a fit loss (FIT).

Makes digit scenes, trains an imperfect teacher and equal students, exports and tests them, and
writes one page, ``work_dirs/demo/index.html``. Every step is a command that a user would type;
its output is in ``logs/``. A finished step is not run again unless its command, a config or a
step before it has changed.

Example:
    python tools/demo/run.py                     # segmentation, minutes on 2 cores
    python tools/demo/run.py --fresh             # everything anew
    python tools/demo/run.py --task detection    # needs mmdetection and mmcv's operators
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from page import write_page
from steps import StepError, run_steps
from tasks import TASKS, plan

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ('contrast', 'data', 'exports', 'logs', 'predictions', 'runs', 'steps', 'tests')


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description='Train on digit scenes and compare on one page')
    parser.add_argument('--task', choices=TASKS, default='segmentation')
    parser.add_argument('--out', type=Path, help='folder, by default the one named in docs/demo.md')
    parser.add_argument('--fresh', action='store_true', help='run finished steps again')
    parser.add_argument('--quick', action='store_true', help='4 iterations, to see that it runs')
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument(
        '--jobs', type=int, default=jobs, help='steps at a time (default: %(default)s)'
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'`--jobs` should be >= 1. Found {args.jobs}.')
    task = TASKS[args.task]
    out = (args.out or task.out).resolve()
    os.chdir(ROOT)
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    if args.fresh:
        for name in WRITTEN:
            shutil.rmtree(out / name, ignore_errors=True)
    try:
        records = run_steps(plan(task, out, args.quick), out, task.fingerprint(), args.jobs)
    except StepError as error:
        sys.exit(f'\n{error}')
    except KeyboardInterrupt:
        sys.exit('\nStopped. Finished steps are kept: call again to go on.')
    page = write_page(task, out, records)
    print(f'\nThe page: {page.resolve()}')


if __name__ == '__main__':
    main()
