"""Networks alone and learning together under every policy: same data, iterations and seeds.

Usage: python benchmarks/collaboration.py camvid --data-root data/camvid --json results.json
       python benchmarks/collaboration.py camvid-three --data-root data/camvid --json results.json
       python benchmarks/collaboration.py bccd --data-root data/bccd --json results.json

Finished runs are reused; each lies in its own folder under --work-dir.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import environment

ROOT = Path(__file__).resolve().parent.parent
CAMVID = dict(
    metric='mIoU',
    factor=1,
    alone=dict(
        fpn='plain/fpn_r18-w16_1200_camvid-192x256.py',
        fcn='plain/fcn_r18-w16_1200_camvid-192x256.py',
    ),
    together='collaborative/col_fpn-fcn_r18-w16_1200_camvid-192x256.py',
    policies=dict(
        MinLoss=[],
        Linear=['model.second.type=Linear'],
        MinLogit=['model.second.type=MinLogit'],
        ValidationWeighted=[
            'model.second.type=ValidationWeighted',
            'model.second.metric=mIoU',
            'model.second.temperature=5.0',
        ],
        General=['model.second.type=General'],
    ),
)
EXPERIMENTS = {
    'camvid': CAMVID,
    'camvid-three': dict(
        CAMVID,
        alone=dict(CAMVID['alone'], psp='plain/pspnet_r18-w16_1200_camvid-192x256.py'),
        together='collaborative/col_fpn-fcn-pspnet_r18-w16_1200_camvid-192x256.py',
    ),
    'bccd': dict(
        metric='coco/bbox_mAP',
        factor=100,
        alone=dict(
            gfl='plain/gfl_r18-w16_8e_bccd-320x240.py',
            atss='plain/atss_r18-w16_8e_bccd-320x240.py',
        ),
        together='collaborative/col_gfl-atss_r18-w16_8e_bccd-320x240.py',
        policies=dict(
            MinLoss=[],
            Linear=['model.second.type=Linear'],
            MinLogit=['model.second.type=MinLogit', 'model.second.shift=False'],
            ValidationWeighted=[
                'model.second.type=ValidationWeighted',
                'model.second.metric=coco/bbox_mAP',
                'model.second.temperature=0.05',
                'train_cfg.val_interval=2',
            ],
            General=['model.second.type=General', 'train_cfg.val_interval=2'],
        ),
    ),
}


def train(config: str, folder: Path, options: list[str], prefixes: list[str], key: str) -> dict:
    """Train, unless that was done.

    Returns:
        Prefix -> the last validation's metric.
    """
    done = folder / 'done'
    if not done.is_file():
        command = [sys.executable, str(ROOT / 'tools/train.py'), str(ROOT / 'configs' / config)]
        command += ['--work-dir', str(folder), '--cfg-options', *options]
        print(' '.join(command), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done.touch()
    logs = folder.glob('*/vis_data/scalars.json')
    lines = max(logs, key=lambda path: path.stat().st_mtime).read_text().splitlines()
    scores = [json.loads(line) for line in lines if f'{prefixes[0]}{key}' in line][-1]
    return {prefix: scores[f'{prefix}{key}'] for prefix in prefixes}


def spread(values: list[float], factor: float) -> str:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f'{statistics.mean(values) * factor:.1f} ± {deviation * factor:.1f}'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--data-root', required=True)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--policies', nargs='+', help='all when not given')
    parser.add_argument('--work-dir', help='work_dirs/collaboration_<experiment> when not given')
    parser.add_argument('--cfg-options', nargs='*', default=[], help='passed on to every run')
    parser.add_argument('--json', help='write all scores there')
    args = parser.parse_args()
    experiment = EXPERIMENTS[args.experiment]
    work_dir = Path(args.work_dir or f'work_dirs/collaboration_{args.experiment}')
    key, networks = experiment['metric'], list(experiment['alone'])
    results: dict[str, dict[str, list[float]]] = {}
    for seed in args.seeds:
        options = [f'data_root={args.data_root}', f'randomness.seed={seed}', *args.cfg_options]
        for name, config in experiment['alone'].items():
            found = train(config, work_dir / f'{name}_s{seed}', options, [''], key)
            results.setdefault('alone', {}).setdefault(name, []).append(found[''])
        for policy in args.policies or experiment['policies']:
            own = [*options, *experiment['policies'][policy]]
            folder = work_dir / f'{policy.lower()}_s{seed}'
            prefixes = [f'{name}/' for name in (*networks, 'ensemble')]
            found = train(experiment['together'], folder, own, prefixes, key)
            for prefix, value in found.items():
                results.setdefault(policy, {}).setdefault(prefix[:-1], []).append(value)
    columns = [*networks, 'ensemble']
    print(f'| {key} | ' + ' | '.join(columns) + ' |\n|' + ' --- |' * (len(columns) + 1))
    for policy, scores in results.items():
        cells = [
            spread(scores[name], experiment['factor']) if name in scores else '' for name in columns
        ]
        print(f'| {policy} | ' + ' | '.join(cells) + ' |')
    if args.json:
        found = dict(seeds=args.seeds, scores=results, environment=environment(torch.device('cpu')))
        Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
