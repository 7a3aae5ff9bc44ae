"""Distance to label boundaries from its definition: the nearest boundary voxel, found by trying them all."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sure_kernels.kernel_lib.labels import counted_voxels


def boundary_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """Whether each voxel of `target` (N, *spatial) is boundary: boolean, same shape.

    A voxel is boundary when its 3^ndim neighbourhood, cut at the image border and without ignored voxels, holds two
    labels: then for some class c >= 1 it is not constant in "belongs to class c". Ignored voxels are none.
    """
    counted = counted_voxels(target, ignore_index)
    labels = target.to(torch.float64).unsqueeze(1)
    pool = F.max_pool2d if target.ndim == 3 else F.max_pool3d
    absent = labels.new_tensor(-math.inf)
    outside = counted.unsqueeze(1)
    highest = pool(torch.where(outside, labels, absent), 3, stride=1, padding=1)
    lowest = -pool(torch.where(outside, -labels, absent), 3, stride=1, padding=1)
    return (highest > lowest).squeeze(1) & counted


def boundary_distance(
    target: Tensor, *, max_distance: float | None, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Float32 (N, 1, *spatial) Euclidean distance to the nearest boundary voxel of the same image, +inf without one."""
    step = torch.tensor(spacing, dtype=torch.float64, device=target.device)
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(s, device=target.device) for s in target.shape[1:]), indexing="ij"), -1
    )
    points = grid.flatten(0, -2) * step
    out = torch.full(target.shape, math.inf, dtype=torch.float64, device=target.device).flatten(1)
    for row, boundary in zip(out, boundary_voxels(target, ignore_index).flatten(1), strict=True):
        sites = points[boundary]
        if len(sites):
            for start in range(0, len(points), 4096):
                pairs = points[start : start + 4096, None] - sites
                row[start : start + 4096] = pairs.square().sum(-1).amin(1).sqrt()
    out = out.view_as(target).unsqueeze(1).float()
    return out if max_distance is None else torch.where(out <= max_distance, out, math.inf)
