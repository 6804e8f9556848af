"""Student alone, plain distillation and SEL on CamVid: same start and iterations, several seeds.

Usage: python benchmarks/camvid.py --data-root data/camvid \
           --teacher good=checkpoints/camvid_fpn-r18.pth --teacher weak=checkpoints/weak.pth

Finished runs are reused; each lies in its own folder under --work-dir.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import environment

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = dict(
    warm='plain/fpn_r18-w16_2400_camvid-192x256.py',
    plain='plain/fpn_r18-w16_600_camvid-192x256.py',
    kd='kd/kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
    sel='selective/sel_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
)
ROW = re.compile(r'^\|\s+(\S+)\s+\|\s+([\d.]+|nan)\s+\|\s+[\d.nan]+\s+\|$', re.MULTILINE)


def train(method: str, teacher: str | None, seed: int, folder: Path, options: list[str]) -> dict:
    """Train one student, unless that was done, and return mIoU and IoU per class."""
    if not list(folder.glob('iter_*.pth')):
        command = [
            sys.executable,
            str(ROOT / 'tools/train.py'),
            str(ROOT / 'configs' / CONFIGS[method]),
        ]
        command += ['--work-dir', str(folder), '--cfg-options', f'randomness.seed={seed}', *options]
        if teacher:
            command.append(f'model.teacher.checkpoint={teacher}')
        print(' '.join(command), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_scores(
        max(folder.glob('*/*.log'), key=lambda path: path.stat().st_mtime).read_text()
    )


def read_scores(log: str) -> dict:
    """Take the last validation's table and mIoU from a log of mmseg."""
    classes = {
        name: float(iou) for name, iou in ROW.findall(log[log.rindex('per class results') :])
    }
    return dict(mIoU=float(re.findall(r'mIoU: ([\d.]+)', log)[-1]), IoU=classes)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f'{statistics.mean(values):.1f} ± {deviation:.1f}'


def print_table(results: dict[str, list[dict]]) -> None:
    """Print a Markdown table: a column per method, a row per class."""
    print('| | ' + ' | '.join(results) + ' |\n|' + ' --- |' * (len(results) + 1))
    print(
        '| **mIoU** | '
        + ' | '.join(spread([r['mIoU'] for r in runs]) for runs in results.values())
        + ' |'
    )
    for name in next(iter(results.values()))[0]['IoU']:
        cells = [spread([run['IoU'][name] for run in runs]) for runs in results.values()]
        print(f'| {name} | ' + ' | '.join(cells) + ' |')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--data-root', required=True)
    parser.add_argument('--teacher', action='append', default=[], metavar='NAME=CHECKPOINT')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', default='work_dirs/camvid')
    parser.add_argument('--cfg-options', nargs='*', default=[], help='passed on to every run')
    parser.add_argument('--json', help='write all scores there')
    args = parser.parse_args()
    teachers = dict(pair.split('=', 1) for pair in args.teacher)
    options = [f'data_root={args.data_root}', *args.cfg_options]
    work_dir = Path(args.work_dir)
    results = {
        'warm start': [train('warm', None, 0, work_dir / 'warm', options)],
        'student alone': [],
    }
    options.append(f'load_from={work_dir / "warm/iter_2400.pth"}')
    for seed in args.seeds:
        scores = train('plain', None, seed, work_dir / f'plain_s{seed}', options)
        results['student alone'].append(scores)
        for name, checkpoint in teachers.items():
            for method in ('kd', 'sel'):
                folder = work_dir / f'{method}_{name}_s{seed}'
                scores = train(method, checkpoint, seed, folder, options)
                results.setdefault(f'{method.upper()}, {name} teacher', []).append(scores)
    print_table(results)
    if args.json:
        found = dict(seeds=args.seeds, scores=results, environment=environment(torch.device('cpu')))
        Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
