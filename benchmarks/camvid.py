"""Student alone and distilled in several ways on CamVid: same start and iterations, several seeds.

Usage: python benchmarks/camvid.py sel --data-root data/camvid \
           --teacher good=checkpoints/camvid_fpn-r18.pth --teacher weak=checkpoints/weak.pth
       python benchmarks/camvid.py fit --data-root data/camvid \
           --teacher good=checkpoints/camvid_fpn-r18.pth

`sel`: all training images; alone, KDLoss, SelectiveLoss. `fit`: thirteen training images; alone, KD
(with the fitting error measured), FIT with KD.

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

from mmdistill_ext.compat import allow_training_checkpoints

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = dict(
    sel=dict(
        warm='plain/fpn_r18-w16_2400_camvid-192x256.py',
        plain='plain/fpn_r18-w16_600_camvid-192x256.py',
        KD='kd/kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
        SEL='selective/sel_fpn_r18_fpn_r18-w16_600_camvid-192x256.py',
    ),
    fit=dict(
        warm='plain/fpn_r18-w16_1200-warm_camvid13-192x256.py',
        plain='plain/fpn_r18-w16_1200_camvid13-192x256.py',
        KD='fit/constant-kd_fpn_r18_fpn_r18-w16_1200_camvid13-192x256.py',
        FIT='fit/fit-kd_fpn_r18_fpn_r18-w16_1200_camvid13-192x256.py',
    ),
)
ROW = re.compile(r'^\|\s+(\S+)\s+\|\s+([\d.]+|nan)\s+\|\s+[\d.nan]+\s+\|$', re.MULTILINE)


def train(
    config: str, teacher: str | None, seed: int, folder: Path, options: list[str]
) -> dict[str, object]:
    """Train one student, unless that was done.

    Returns:
        mIoU and IoU per class, and for a run with the fit loss what it measured.
    """
    if not list(folder.glob('iter_*.pth')):
        command = [sys.executable, str(ROOT / 'tools/train.py'), str(ROOT / 'configs' / config)]
        command += ['--work-dir', str(folder), '--cfg-options', f'randomness.seed={seed}', *options]
        if teacher:
            command.append(f'model.teacher.checkpoint={teacher}')
        print(' '.join(command), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = max(folder.glob('*/*.log'), key=lambda path: path.stat().st_mtime).read_text()
    allow_training_checkpoints()
    state = torch.load(last_checkpoint(folder), map_location='cpu', weights_only=True)
    history = {'fit': state['fit']['history']} if 'fit' in state else {}
    return {**read_scores(log), **history}


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the last iteration in a work folder."""
    return max(folder.glob('iter_*.pth'), key=lambda path: int(path.stem[5:]))


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
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--data-root', required=True)
    parser.add_argument('--teacher', action='append', default=[], metavar='NAME=CHECKPOINT')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', help='work_dirs/camvid_<experiment> when not given')
    parser.add_argument('--cfg-options', nargs='*', default=[], help='passed on to every run')
    parser.add_argument('--json', help='write all scores there')
    args = parser.parse_args()
    teachers = dict(pair.split('=', 1) for pair in args.teacher)
    options = [f'data_root={args.data_root}', *args.cfg_options]
    work_dir = Path(args.work_dir or f'work_dirs/camvid_{args.experiment}')
    configs = dict(EXPERIMENTS[args.experiment])
    warm, plain = configs.pop('warm'), configs.pop('plain')
    results = {
        'warm start': [train(warm, None, 0, work_dir / 'warm', options)],
        'student alone': [],
    }
    options.append(f'load_from={last_checkpoint(work_dir / "warm")}')
    for seed in args.seeds:
        scores = train(plain, None, seed, work_dir / f'plain_s{seed}', options)
        results['student alone'].append(scores)
        for name, checkpoint in teachers.items():
            for method, config in configs.items():
                folder = work_dir / f'{method.lower()}_{name}_s{seed}'
                scores = train(config, checkpoint, seed, folder, options)
                results.setdefault(f'{method}, {name} teacher', []).append(scores)
    print_table(results)
    if args.json:
        found = dict(seeds=args.seeds, scores=results, environment=environment(torch.device('cpu')))
        Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
