"""The page's pictures of boxes and of contrast masks."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import torch
from figures import colored, png
from mmdet.datasets import CocoDataset
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from results import Demo, latest_log
from tables import NAMES, table

from mmdistill_ext.visualization.contrast import CONTRAST_COLORS, CONTRAST_VALUES

SCENES_SHOWN = 5
MIN_SCORE = 0.3
ZOOM = 3  # scenes are enlarged, for the text to fit


def scene_table(demo: Demo) -> str:
    """Return the first validation scenes: boxes of the label and of the models."""
    shown = (*demo.students, 'teacher')
    scenes = [label_sample(info) for info in read_labels(demo)]
    columns = [read_predictions(demo.out / 'predictions' / f'{name}.pkl') for name in shown]
    painter = DetLocalVisualizer()
    painter.dataset_meta = demo.meta
    rows = []
    for sample in scenes:
        image = cv2.imread(sample.img_path)[..., ::-1]
        samples = [sample, *(column[Path(sample.img_path).name] for column in columns)]
        rows.append([cell(paint(painter, image, one)) for one in samples])
    return table(['Label', *(NAMES[name] for name in shown)], rows, 'scenes')


def cell(picture: np.ndarray) -> str:
    """Return a picture as HTML."""
    return f'<img src="{png(picture)}" alt="">'


def read_labels(demo: Demo) -> list[dict]:
    """What mmdet's data set knows of the first validation scenes."""
    dataset = CocoDataset(
        data_root=str(demo.out / 'data'),
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='images/val/'),
        metainfo=demo.meta,
        test_mode=True,
    )
    return [dataset.get_data_info(index) for index in range(min(SCENES_SHOWN, len(dataset)))]


def label_sample(info: dict) -> DetDataSample:
    """The labelled boxes of a scene."""
    boxes = torch.tensor([instance['bbox'] for instance in info['instances']]).reshape(-1, 4)
    labels = torch.tensor([instance['bbox_label'] for instance in info['instances']]).long()
    sample = DetDataSample(metainfo=dict(img_path=info['img_path']))
    sample.gt_instances = InstanceData(bboxes=boxes * ZOOM, labels=labels)
    return sample


def read_predictions(path: Path) -> dict[str, DetDataSample]:
    """Image -> predicted boxes, as ``tools/test.py --out`` left them."""
    with path.open('rb') as file:
        found = pickle.load(file)  # the demo's own file
    samples = {}
    for entry in found:
        predicted = entry['pred_instances']
        sample = DetDataSample(metainfo=dict(img_path=entry['img_path']))
        sample.pred_instances = InstanceData(
            bboxes=predicted['bboxes'] * ZOOM,
            labels=predicted['labels'],
            scores=predicted['scores'],
        )
        samples[Path(entry['img_path']).name] = sample
    return samples


def paint(painter: DetLocalVisualizer, image: np.ndarray, sample: DetDataSample) -> np.ndarray:
    """Draw a sample's boxes on its image ``(H, W, 3)`` RGB; return it enlarged by ``ZOOM``."""
    large = cv2.resize(image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_NEAREST)
    is_predicted = 'pred_instances' in sample
    painter.add_datasample(
        '',
        large,
        sample,
        draw_gt=not is_predicted,
        draw_pred=is_predicted,
        pred_score_thr=MIN_SCORE,
    )
    return painter.get_image()


def mask_table(demo: Demo) -> str:
    """Return the last contrast masks of SEL: one per level, over the image and alone."""
    log = latest_log(demo.out, 'student_sel', '')
    steps = [int(folder.name.split('_')[1]) for folder in log.glob('contrast_masks/iter_*')]
    masks = log / f'contrast_masks/iter_{max(steps)}/sel'
    colors = {value: CONTRAST_COLORS[name] for name, value in CONTRAST_VALUES.items()}
    levels = sorted({stride(path) for path in masks.glob('*.png')})
    rows = []
    for index in range(len(list(masks.glob(f'*_stride{levels[0]}.png')))):
        row = []
        for path in sorted(masks.glob(f'{index}_*.png'), key=stride):
            overlay = f'contrast_sel_{index}_stride{stride(path)}_{max(steps)}.png'
            row.append(cell(cv2.imread(str(log / 'vis_image' / overlay))[..., ::-1]))
            row.append(cell(colored(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), colors)))
        rows.append(row)
    header = [f'{what} {level}' for level in levels for what in ('Scene, stride', 'Mask, stride')]
    return table(header, rows, 'scenes')


def stride(path: Path) -> int:
    """The level of a mask, from its name."""
    return int(path.stem.rpartition('_stride')[2])
