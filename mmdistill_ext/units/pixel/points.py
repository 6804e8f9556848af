"""Units that are points of an image (PointRend, CVPR 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_map(logits: Tensor, points: Tensor, align_corners: bool) -> Tensor:
    """Logits at points, bilinear (PointRend, section 3.1).

    Args:
        logits: ``(B, C, H, W)``.
        points: ``(B, N, 2)``, (x, y) in [0, 1].
        align_corners: 0 and 1 are the centres of the outer pixels, instead of the map's edges.

    Returns:
        ``(B, C, N)``.
    """
    grid = (2 * points - 1).to(logits).unsqueeze(2)
    sampled = F.grid_sample(logits, grid, padding_mode='border', align_corners=align_corners)
    return sampled.squeeze(3)


def sample_labels(labels: Tensor, points: Tensor, align_corners: bool) -> Tensor:
    """Labels of the nearest pixels, ``(B, N)`` (PointRend, section 3.1).

    Args:
        labels: ``(B, H, W)``.
        points: ``(B, N, 2)``, (x, y) in [0, 1].
        align_corners: As in :func:`sample_map`.
    """
    grid = (2 * points - 1).float().unsqueeze(2)
    maps = labels.unsqueeze(1).float()
    nearest = F.grid_sample(maps, grid, 'nearest', 'border', align_corners)
    return nearest.flatten(1).to(labels.dtype)


def paint_points(
    points: Tensor, size: torch.Size, wins: Tensor, valid: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps of units that are points (SEL-4): pixels without a point are not valid.

    Args:
        points: ``(B, N, 2)``, (x, y) in [0, 1].
        size: ``(H, W)``.
        wins: ``(B, N)`` bool.
        valid: ``(B, N)`` bool.

    Returns:
        ``'' -> (wins, valid)``, both ``(B, H, W)`` bool.
    """
    height, width = size
    extent = points.new_tensor((width, height))
    x, y = (points * extent).floor().clamp(min=0).minimum(extent - 1).long().unbind(-1)
    image = torch.arange(len(points), device=points.device)[:, None]
    maps = torch.zeros(2, len(points), height, width, dtype=torch.bool, device=points.device)
    for target, chosen in zip(maps, (wins & valid, valid), strict=True):
        kept = chosen.nonzero(as_tuple=True)
        target[image.expand_as(x)[kept], y[kept], x[kept]] = True
    return {'': (maps[0], maps[1])}
