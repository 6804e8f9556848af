"""A step of networks that learn together against each alone: time and extra peak memory.

PSPNet and DeepLabV3+ on ResNet-18 of mmsegmentation, 19 classes, optimizer included; together as
usual, and with the backward passes one after another. Weights are random: they do not change it.

Usage: python benchmarks/collaboration_step.py [--size 2 256 512] [--json benchmarks/results/x.json]
"""

from __future__ import annotations

import torch
from common import (
    MIB,
    alternate,
    environment,
    extra_peak_bytes,
    step_parser,
    training_steps,
    write_json,
)
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.distillers.build import build_model, resolve_model_cfg

NETWORKS = dict(
    psp='mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    deeplab='mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
)
SECOND = ('MinLoss', 'Linear')


def raw_batch(batch: int, height: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    images, samples = [], []
    for _ in range(batch):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator).byte())
        label = torch.randint(0, 19, (1, height, width), generator=generator)
        shape = dict(img_shape=(height, width), ori_shape=(height, width))
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=shape))
    return dict(inputs=images, data_samples=samples)


def main() -> None:
    args = step_parser(__doc__, repeats=7).parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)

    configs = {name: resolve_model_cfg(spec) for name, spec in NETWORKS.items()}
    for cfg in configs.values():
        cfg.pretrained = None
        cfg.data_preprocessor.size = tuple(args.size[1:])
    models = {name: build_model(cfg) for name, cfg in configs.items()}
    for second in SECOND:
        models[f'together, {second}'] = CollaborativeDistiller(configs, dict(type=second))
    models['together, MinLoss, one after another'] = CollaborativeDistiller(
        configs, dict(type='MinLoss'), sequential_backward=True
    )
    models = {name: revert_sync_batchnorm(model) for name, model in models.items()}
    sides = training_steps(models, raw_batch(*args.size), device)
    times = alternate(sides, device, args.repeats)
    peaks = {name: extra_peak_bytes(side, device) / MIB for name, side in sides.items()}
    alone = sum(times[name]['median'] for name in NETWORKS)
    each = [peaks[name] for name in NETWORKS]
    print(
        '| side | time (median, least to largest) | / sum | extra peak | / sum | / largest |\n'
        '|---|---|---|---|---|---|'
    )
    for name, found in times.items():
        ratios = [found['median'] / alone, peaks[name] / sum(each), peaks[name] / max(each)]
        shown = ['' if name in NETWORKS else f'{ratio:.2f}' for ratio in ratios]
        print(
            f'| {name} | {found["median"]:.2f} s ({found["least"]:.2f} to {found["largest"]:.2f}) '
            f'| {shown[0]} | {peaks[name]:.0f} MiB | {shown[1]} | {shown[2]} |'
        )
    write_json(
        args.json,
        dict(size=list(args.size), times=times, peaks=peaks, environment=environment(device)),
    )


if __name__ == '__main__':
    main()
