"""Distance to label boundaries by SciPy's Euclidean distance transform on the CPU, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def boundary_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """As the reference, by separable minima and maxima."""
    counted = target != ignore_index
    limits = torch.iinfo(torch.int32)
    labels = target.to(torch.int32)
    low, high = torch.where(counted, labels, limits.max), torch.where(counted, labels, limits.min)
    for axis in range(1, target.ndim):
        low = _extreme(low, axis, torch.minimum)
        high = _extreme(high, axis, torch.maximum)
    return (high > low) & counted


def _extreme(x: Tensor, axis: int, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """min or max over three neighbours along `axis`, cut at the border."""
    n = x.shape[axis]
    out = x.clone()
    if n > 1:
        inner, outer = out.narrow(axis, 0, n - 1), x.narrow(axis, 1, n - 1)
        inner.copy_(pick(inner, outer))
        inner, outer = out.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1)
        inner.copy_(pick(inner, outer))
    return out


def boundary_distance(
    target: Tensor, *, max_distance: float | None, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Float32 (N, 1, *spatial) on the target's device; +inf without a boundary or beyond `max_distance`."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise ImportError("boundary_distance needs SciPy: pip install 'sure-kernels[train]'") from error
    boundary = boundary_voxels(target, ignore_index).cpu().numpy()
    out = torch.full(target.shape, math.inf, dtype=torch.float32)
    for row, sites in zip(out, boundary, strict=True):
        # Without a single site SciPy measures the distance to a corner that is not there.
        if sites.any():
            row.copy_(torch.from_numpy(distance_transform_edt(~sites, sampling=spacing)))
    if max_distance is not None:
        out.masked_fill_(out > max_distance, math.inf)
    return out.unsqueeze(1).to(target.device)
