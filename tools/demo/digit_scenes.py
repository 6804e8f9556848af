"""Digit scenes: a small data set made on the spot, for the demo and for tests.

Scenes are composed of scikit-learn's bundled handwritten digits (1,797 images of 8x8), enlarged,
turned and painted, partly overlapping, on textured backgrounds with clutter. Nothing is
downloaded. What is written is what mmseg's ``BaseSegDataset`` and mmdet's ``CocoDataset`` read::

    root/images/{train,val}/000000.png
    root/annotations/{train,val}/000000.png        0 background, 1..10 the digits 0..9, 255 void
    root/annotations/train_archive/000000.png      the same scenes, 8 and 9 mixed up
    root/annotations/instances_{train,val}.json    COCO boxes and masks (RLE) of the visible parts
    root/annotations/instances_train_archive.json  the same boxes, 8 and 9 mixed up as above
    root/manifest.json                             the parameters

Void is the soft border of a stroke, where a person could not say either. ``train_archive`` is what
the demo's imperfect teacher learns from: whoever labelled it could not tell 8 from 9, so that each
of these digits carries one of the two labels, at random.

Example:
    python tools/demo/digit_scenes.py data/digit_scenes --num-train 480 --num-val 120 --seed 0
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('background', *'0123456789')
VOID = 255
VERSION = 2  # raise it when the same parameters give other files
MIN_SIZE = 32


def make_digit_scenes(
    root: str | Path,
    num_train: int = 480,
    num_val: int = 120,
    size: int = 96,
    seed: int = 0,
    mixed_up: tuple[int, int] = (8, 9),
) -> Path:
    """Write a set of digit scenes, or keep the one that is there with the same parameters.

    Scene ``i`` depends on ``seed``, its split and ``i`` only, and the two splits draw from
    disjoint digits. The folder appears complete or not at all.

    Args:
        root: Folder to write. One that holds other digit scenes is replaced.
        num_train: Number of training scenes, >= 1.
        num_val: Number of validation scenes, >= 1.
        size: Height and width of a scene in pixels, >= 32.
        seed: Seed, >= 0.
        mixed_up: Two digits that carry either's label in ``train_archive``, at random.

    Returns:
        ``root``.

    Raises:
        ValueError: A parameter is out of range.
        FileExistsError: ``root`` holds something else.
    """
    lowest = dict(num_train=1, num_val=1, size=MIN_SIZE, seed=0)
    params = dict(num_train=num_train, num_val=num_val, size=size, seed=seed)
    for name, value in params.items():
        if not isinstance(value, int) or value < lowest[name]:
            raise ValueError(f'`{name}` should be an integer >= {lowest[name]}. Found {value!r}.')
    if len(set(mixed_up)) != 2 or not set(mixed_up) <= set(range(10)):
        raise ValueError(f'`mixed_up` should be two digits 0..9. Found {mixed_up!r}.')
    manifest = dict(what='digit scenes', version=VERSION, mixed_up=sorted(mixed_up), **params)

    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        found = _read_manifest(root)
        if found == manifest:
            return root
        if found is None:
            raise FileExistsError(f'`root` should be new or hold digit scenes. Found {root}.')

    scratch = root.with_name(f'.{root.name}.{os.getpid()}')
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for split, count in (('train', num_train), ('val', num_val)):
            _write_split(scratch, split, count, size, seed, mixed_up)
        (scratch / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
        if root.exists():
            shutil.rmtree(root)
        scratch.rename(root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return root


def _read_manifest(root: Path) -> dict | None:
    """The manifest of digit scenes at ``root``, or None when something else is there."""
    try:
        manifest = json.loads((root / 'manifest.json').read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get('what') == 'digit scenes'
    return manifest if is_ours else None


def _write_split(
    root: Path, split: str, count: int, size: int, seed: int, mixed_up: tuple[int, int]
) -> None:
    """Write images, label maps and the COCO file of one split."""
    glyphs, digits = _split_digits(split, seed)
    names = [split, 'train_archive'] if split == 'train' else [split]
    folders = [root / 'images' / split, *(root / 'annotations' / name for name in names)]
    for folder in folders:
        folder.mkdir(parents=True)
    shapes = {name: [] for name in names}
    for index in range(count):
        rng = np.random.default_rng([seed, split == 'val', index])
        image, labels, instances = compose_scene(rng, glyphs, digits, size)
        boxes = [_coco_shape(mask) for _, mask in instances]
        archive = _mix_up(rng, instances, mixed_up)
        for folder, picture in zip(
            folders, (image, labels, _relabelled(labels, archive)), strict=False
        ):
            cv2.imwrite(str(folder / f'{index:06d}.png'), picture)
        for name, called in zip(names, (instances, archive), strict=False):
            pairs = zip(called, boxes, strict=True)
            shapes[name].append([(int(digit), box) for (digit, _), box in pairs])
    for name in names:
        text = json.dumps(_coco(shapes[name], size))
        (root / 'annotations' / f'instances_{name}.json').write_text(text)


def _coco(shapes: list[list[tuple[int, dict]]], size: int) -> dict:
    """The COCO file of scenes with these digits and shapes; categories are numbered as labels."""
    names = [f'{index:06d}.png' for index in range(len(shapes))]
    flat = [(index, *pair) for index, pairs in enumerate(shapes) for pair in pairs]
    return dict(
        images=[dict(id=i, file_name=n, height=size, width=size) for i, n in enumerate(names)],
        annotations=[
            dict(id=number, image_id=index, category_id=digit + 1, iscrowd=0, **shape)
            for number, (index, digit, shape) in enumerate(flat, start=1)
        ],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES) if i],
    )


def _mix_up(
    rng: np.random.Generator, instances: list[tuple[int, np.ndarray]], digits: tuple[int, int]
) -> list[tuple[int, np.ndarray]]:
    """The instances, with each of the two digits called one or the other, at random."""
    return [(rng.choice(digits) if digit in digits else digit, mask) for digit, mask in instances]


def _relabelled(labels: np.ndarray, instances: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """The label map with other names of its digits."""
    labels = labels.copy()
    for digit, mask in instances:
        labels[mask] = digit + 1
    return labels


def _split_digits(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits of one split: 80 % of the 1,797 for training, the others for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng([seed, 2]).permutation(len(data.target))
    cut = int(0.8 * len(order))
    chosen = order[:cut] if split == 'train' else order[cut:]
    return data.images[chosen].astype(np.float32) / 16, data.target[chosen]


def compose_scene(
    rng: np.random.Generator, glyphs: np.ndarray, digits: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Compose one scene.

    Args:
        rng: Source of every choice.
        glyphs: (N, 8, 8) float32 in [0, 1].
        digits: (N,) the digit of each glyph.
        size: Height and width in pixels.

    Returns:
        Image (size, size, 3) uint8 BGR; labels (size, size) uint8; a list of (digit,
        visible mask) from the back to the front.
    """
    image = _background(rng, size)
    labels = np.zeros((size, size), np.uint8)
    owner = np.full((size, size), -1)
    placed = []
    for _ in range(rng.integers(5, 9)):
        pick = rng.integers(len(digits))
        alpha = _place(rng, glyphs[pick], size)
        ink, border = alpha > 0.5, (alpha > 0.3) & (alpha <= 0.5)
        left = [np.count_nonzero((owner == i) & ~ink & ~border) for i in range(len(placed))]
        if any(rest < 0.65 * area for rest, (_, area) in zip(left, placed, strict=True)):
            continue  # it would hide too much of a digit that is already there
        under = image[ink].mean(axis=0)
        opacity = np.clip((alpha - 0.25) / 0.35, 0, 1)[..., None]
        image = image * (1 - opacity) + _darker(rng, under) * opacity
        labels[ink], labels[border] = digits[pick] + 1, VOID
        owner[ink], owner[border] = len(placed), -1
        placed.append((digits[pick], np.count_nonzero(ink)))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9))
    image += rng.normal(0, rng.uniform(2, 8), image.shape)
    instances = [(digit, owner == i) for i, (digit, _) in enumerate(placed)]
    return image.clip(0, 255).astype(np.uint8), labels, instances


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A texture of cloud and stripes, with strokes and blobs that are no digits."""
    image = np.full((size, size, 3), rng.uniform(110, 220) + rng.normal(0, 25, 3), np.float32)
    for cells, strength in ((4, 18), (16, 8)):
        cloud = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(cloud, (size, size), interpolation=cv2.INTER_CUBIC)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 20)
    rows, columns = np.mgrid[:size, :size]
    wave = np.sin((np.cos(angle) * rows + np.sin(angle) * columns) * 2 * np.pi / period)
    image += rng.uniform(0, 10) * wave[..., None]
    for _ in range(rng.integers(3, 8)):
        colour = _darker(rng, image.mean(axis=(0, 1))).tolist()
        centre = rng.integers(0, size, 2).tolist()
        axes = rng.integers(3, max(4, size // 6), 2).tolist()
        turn, start, sweep = rng.uniform(0, 360, 3)
        thickness = int(rng.integers(1, 6))
        image = np.ascontiguousarray(image)
        cv2.ellipse(image, centre, axes, turn, start, start + sweep, colour, thickness)
    return image


def _darker(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """An ink 60 to 120 grey levels below the colour ``under``."""
    return np.clip(under - rng.uniform(60, 120) + rng.normal(0, 18, 3), 0, 255)


def _place(rng: np.random.Generator, glyph: np.ndarray, size: int) -> np.ndarray:
    """A (size, size) map in [0, 1]: the glyph enlarged 3 to 4.5 times, turned, somewhere inside."""
    scale = rng.uniform(3, 4.5) * min(1, size / 96)
    turn = np.deg2rad(rng.uniform(-8, 8))
    shear = rng.uniform(-0.1, 0.1)
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = scale * linear @ np.array([[rng.uniform(0.85, 1.1), shear], [0, 1]])
    centre = rng.uniform(4 * scale, size - 4 * scale, 2)
    matrix = np.hstack([linear, (centre - linear @ [3.5, 3.5])[:, None]])
    return cv2.warpAffine(glyph, matrix, (size, size), flags=cv2.INTER_CUBIC).clip(0, 1)


def _coco_shape(mask: np.ndarray) -> dict:
    """Box (x, y, w, h), area and uncompressed RLE (column by column) of a boolean mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size])
    counts = [0, *runs] if flat[0] else runs
    return dict(
        bbox=[float(v) for v in box],
        area=int(mask.sum()),
        segmentation=dict(counts=[int(n) for n in counts], size=list(mask.shape)),
    )


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description='Write digit scenes in mmseg and COCO layout')
    parser.add_argument('root', help='folder to write')
    parser.add_argument('--num-train', type=int, default=480)
    parser.add_argument('--num-val', type=int, default=120)
    parser.add_argument('--size', type=int, default=96, help='height and width in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    root = make_digit_scenes(args.root, args.num_train, args.num_val, args.size, args.seed)
    print(f'{args.num_train} + {args.num_val} scenes in {root}')


if __name__ == '__main__':
    main()
