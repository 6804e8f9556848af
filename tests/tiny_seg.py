"""A segmentation run that takes a second: four random images, three classes, tiny models."""

import runpy
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmengine.utils import ManagerMixin
from mmseg.structures import SegDataSample

from mmdistill_ext.distillers.build import build_model

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ('sky', 'traffic light', 'road')
PALETTE = [[0, 0, 255], [255, 0, 0], [0, 255, 0]]
SIZES = ((32, 40), (32, 40), (24, 36), (32, 40))


def write_data(root: Path, split: str) -> None:
    """Write images and labels, some of them void, in mmseg's layout."""
    rng = np.random.default_rng(len(split))
    for folder in ('img', 'ann'):
        (root / folder / split).mkdir(parents=True)
    for i, size in enumerate(SIZES):
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        label = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        cv2.imwrite(str(root / f'img/{split}/{i}.png'), image)
        cv2.imwrite(str(root / f'ann/{split}/{i}.png'), label)


def model(channels: int, num_classes: int = 3) -> dict:
    """Return a ResNet-18 with an FCN head, its widths set by ``channels``."""
    norm = dict(type='BN', requires_grad=True)
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=[127.5] * 3,
            std=[64.0] * 3,
            bgr_to_rgb=True,
            pad_val=0,
            seg_pad_val=255,
            size=(32, 40),
        ),
        backbone=dict(
            type='ResNetV1c',
            depth=18,
            stem_channels=channels,
            base_channels=channels,
            norm_cfg=norm,
            strides=(1, 2, 1, 1),
        ),
        decode_head=dict(
            type='FCNHead',
            in_channels=8 * channels,
            channels=8,
            num_convs=1,
            dropout_ratio=0.0,
            num_classes=num_classes,
            norm_cfg=norm,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )


def dataloader(root: Path, split: str) -> dict:
    """Return a loader of two images without worker processes."""
    return dict(
        batch_size=2 if split == 'train' else 1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='BaseSegDataset',
            data_root=str(root),
            data_prefix=dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}'),
            img_suffix='.png',
            metainfo=dict(classes=CLASSES, palette=PALETTE),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
                dict(type='PackSegInputs'),
            ],
        ),
    )


def config(root: Path, work_dir: Path) -> Config:
    """Return the plain student's run: two iterations, then validation."""
    evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
    return Config(
        dict(
            default_scope='mmseg',
            model=model(8),
            train_dataloader=dataloader(root, 'train'),
            val_dataloader=dataloader(root, 'val'),
            test_dataloader=dataloader(root, 'val'),
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
            val_cfg=dict(type='ValLoop'),
            test_cfg=dict(type='TestLoop'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(
                timer=dict(type='IterTimerHook'),
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
                visualization=dict(type='SegVisualizationHook'),
            ),
            log_processor=dict(by_epoch=False),
            vis_backends=[dict(type='LocalVisBackend')],
            visualizer=dict(
                type='SegLocalVisualizer',
                vis_backends=[dict(type='LocalVisBackend')],
                name='visualizer',
            ),
            work_dir=str(work_dir),
            randomness=dict(seed=0),
        )
    )


def save_weights(path: Path, cfg: dict, seed: int) -> str:
    """Save a built model's first weights as a checkpoint."""
    torch.manual_seed(seed)
    built = build_model({'_scope_': 'mmseg', **cfg})
    built.init_weights()
    meta = dict(dataset_meta=dict(classes=CLASSES, palette=PALETTE))
    torch.save(dict(state_dict=built.state_dict(), meta=meta), path)
    return str(path)


def distil(cfg: Config, teacher_checkpoint: str, **hooks: dict) -> Config:
    """Return the same run with a wider teacher and the selective loss."""
    cfg = Config(cfg.to_dict())
    cfg.model = dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=cfg.model,
        teacher=dict(model=model(16), checkpoint=teacher_checkpoint),
        losses=dict(sel=dict(type='SelectiveLoss', temperature=2.0)),
    )
    cfg.custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
    cfg.custom_hooks = list(hooks.values())
    return cfg


def forget_runs() -> None:
    """Forget earlier runners of this process, as mmengine's own tests do: they share names."""
    classes = [ManagerMixin]
    for cls in classes:
        classes.extend(cls.__subclasses__())
        cls._instance_dict.clear()


def tool(name: str) -> Callable[..., None]:
    """Return the ``main`` of a script in ``tools/``, to be called with its arguments."""
    main = runpy.run_path(str(ROOT / 'tools' / f'{name}.py'))['main']

    def call(*args: object) -> None:
        forget_runs()
        main([str(arg) for arg in args])

    return call


def sample(label: torch.Tensor) -> SegDataSample:
    """Return a data sample with a label image (H, W)."""
    meta = dict(img_shape=label.shape, ori_shape=label.shape, pad_shape=label.shape)
    return SegDataSample(gt_sem_seg=PixelData(data=label[None]), metainfo=meta)


def samples(labels: torch.Tensor) -> list[SegDataSample]:
    """Return one data sample per label image of (B, H, W)."""
    return [sample(label) for label in labels]
