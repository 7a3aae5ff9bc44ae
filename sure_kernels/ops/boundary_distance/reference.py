"""Distance to label boundaries from its definition: the nearest boundary voxel, found by trying them all."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sure_kernels.kernel_lib.labels import BETWEEN, BOUNDARY, FAR, NEAR, comparable
from sure_kernels.ops.boundary_distance.codes import reach


def boundary_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """Whether each voxel of `target` (N, *spatial) is boundary: boolean, same shape.

    A voxel is boundary when its 3^ndim neighbourhood, cut at the image border and without ignored voxels, is not
    constant in "belongs to class c" for some c >= 1: when it holds a label other than the voxel's own, all labels
    below 1 being the same background. Ignored voxels are none.
    """
    labels, ignored = comparable(target, ignore_index)
    counted = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
    if target.dtype.is_signed:
        labels = labels.clamp(min=0)
    border = (1, 1) * (target.ndim - 1)
    around, around_counted = F.pad(labels, border), F.pad(counted, border)
    found = torch.zeros_like(counted)
    for offsets in itertools.product(range(3), repeat=target.ndim - 1):
        neighbour = (slice(None), *(slice(o, o + n) for o, n in zip(offsets, target.shape[1:], strict=True)))
        found |= around_counted[neighbour] & (around[neighbour] != labels)
    return found & counted


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
    return out if max_distance is None else torch.where(out <= reach(max_distance), out, math.inf)


def boundary_band(
    target: Tensor, *, boundary: float, near: float, far: float, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """uint8 (N, 1, *spatial): 2 up to `boundary`, 1 up to `near`, 3 beyond `far`, 0 between."""
    distance = boundary_distance(target, max_distance=None, spacing=spacing, ignore_index=ignore_index)
    band = torch.full_like(distance, BETWEEN, dtype=torch.uint8)
    band[distance > reach(far)] = FAR
    band[distance <= reach(near)] = NEAR
    band[distance <= reach(boundary)] = BOUNDARY
    return band
