"""What the demo runs for each of its tasks: segmentation and detection."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from steps import Step

PLAIN = ('teacher', 'student')
QUICK = (
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=4',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.indices=4',
    *(f'{name}_dataloader.num_workers=0' for name in ('train', 'val', 'test')),
    *(f'{name}_dataloader.persistent_workers=False' for name in ('train', 'val', 'test')),
)


@dataclass(frozen=True)
class Task:
    """What differs between the tasks.

    Args:
        name: Also the module that reads and shows its results.
        out: Folder of everything that the demo writes, by default.
        configs: Folder of the five configs.
        data: Config of the data set.
        distilled: The students that have a teacher, in the order of urgency.
        data_options: Further options of every command; ``{root}`` is the folder of the scenes.
        predictions: Suffix of what ``test.py --out`` writes; none for a folder.
        masks: Whether ``contrast_masks.py`` knows the task.
        quick: Model -> further options of its training when it is only tried.
    """

    name: str
    out: Path
    configs: Path
    data: Path
    distilled: tuple[str, ...]
    data_options: tuple[str, ...] = ()
    predictions: str = ''
    masks: bool = False
    quick: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Tell the task's configs from any other version of them."""
        files = [*sorted(self.configs.glob('*.py')), self.data]
        return hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:16]


TASKS = {
    task.name: task
    for task in (
        Task(
            name='segmentation',
            out=Path('work_dirs/demo'),
            configs=Path('configs/demo'),
            data=Path('configs/_base_/datasets/digit_scenes.py'),
            distilled=('student_kd', 'student_sel', 'student_fit'),
            masks=True,
            quick=dict(student_fit=('custom_hooks.0.interval=1', 'custom_hooks.0.begin=0')),
        ),
        Task(
            name='detection',
            out=Path('work_dirs/demo_detection'),
            configs=Path('configs/demo/detection'),
            data=Path('configs/_base_/datasets/digit_scenes_det.py'),
            distilled=('student_kd', 'student_sel', 'student_fit'),
            data_options=tuple(
                f'{split}_evaluator.ann_file={{root}}/annotations/instances_val.json'
                for split in ('val', 'test')
            ),
            predictions='.pkl',
            quick=dict(
                student_sel=('custom_hooks.1.interval=2',),
                student_fit=('custom_hooks.0.interval=1', 'custom_hooks.0.begin=0'),
            ),
        ),
    )
}


def plan(task: Task, out: Path, quick: bool = False) -> list[Step]:
    """List the steps of the demo, in the order of urgency. Paths are relative to the project.

    Args:
        task: Which demo.
        out: Folder of everything that the demo writes.
        quick: A handful of scenes and iterations, only to see that everything runs.

    Returns:
        The steps, with what each needs.
    """
    num_train, num_val = (8, 4) if quick else (480, 120)
    data = [f'{name}_dataloader.dataset.data_root={out}/data' for name in ('train', 'val', 'test')]
    data += [option.format(root=f'{out}/data') for option in task.data_options]
    data += QUICK if quick else []
    iters = 4 if quick else Config.fromfile(task.configs / 'student.py').train_cfg.max_iters
    teacher = [f'model.teacher.checkpoint={out}/runs/teacher/iter_{iters}.pth']

    def step(kind: str, name: str, tool: str, args: list, needs: list, options: Sequence = ()):
        command = [sys.executable, f'tools/{tool}', *args]
        command += ['--cfg-options', *data, *options]
        return Step(f'{kind} {name}', [str(part) for part in command], needs)

    def train(name: str) -> Step:
        args = [task.configs / f'{name}.py', '--work-dir', out / 'runs' / name]
        needs = ['scenes'] if name in PLAIN else ['train teacher']
        options = [] if name in PLAIN else teacher
        options = [*options, *(task.quick.get(name, ()) if quick else ())]
        return step('train', name, 'train.py', args, needs, options)

    def export(name: str) -> Step:
        args = [task.configs / f'{name}.py', out / 'runs' / name / f'iter_{iters}.pth']
        args.append(out / 'exports' / name)
        return step('export', name, 'export_student.py', args, [f'train {name}'], teacher)

    def test(name: str) -> Step:
        if name in PLAIN:
            args = [task.configs / f'{name}.py', out / 'runs' / name / f'iter_{iters}.pth']
        else:
            args = [out / 'exports' / name / file for file in ('student.py', 'student.pth')]
        args += ['--work-dir', out / 'tests' / name]
        args += ['--out', out / 'predictions' / f'{name}{task.predictions}']
        return step(
            'test', name, 'test.py', args, [f'{"train" if name in PLAIN else "export"} {name}']
        )

    def masks(name: str) -> Step:
        args = [task.configs / f'{name}.py', out / 'exports' / name / 'student.pth']
        args.append(out / 'contrast')
        return step('contrast', name, 'contrast_masks.py', args, [f'export {name}'], teacher)

    scenes = [sys.executable, 'tools/demo/digit_scenes.py', out / 'data', '--seed', 0]
    scenes += ['--num-train', num_train, '--num-val', num_val]
    return [
        Step('scenes', [str(part) for part in scenes], []),
        *(train(name) for name in ('teacher', *task.distilled, 'student')),
        *(export(name) for name in task.distilled),
        *(masks(name) for name in ('student_sel',) if task.masks),
        *(test(name) for name in (*task.distilled, *PLAIN)),
    ]
