"""Distance to label boundaries, exact, axis by axis, on the tensor's device.

The squared distance separates: d2(x) = min over y of (x_1 - y_1)^2 s_1^2 + ... is one min-plus pass along each axis,
d2[i] <- min over j of d2[j] + (i - j)^2 s^2. A pass looks as far as a distance can still shrink: to max_distance, or
without one until the step alone exceeds the largest distance left.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sure_kernels.kernel_lib.labels import counted_voxels


def boundary_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """As the reference, by separable minima and maxima."""
    counted = counted_voxels(target, ignore_index)
    labels = target if target.dtype == torch.int64 else target.to(torch.int32)
    limits = torch.iinfo(labels.dtype)
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


def _shrink(d2: Tensor, axis: int, step: float, limit: float | None) -> Tensor:
    """One min-plus pass along `axis`; `limit` is the distance beyond which nothing need be exact."""
    n = d2.shape[axis]
    out = d2.clone()
    for shift in range(1, n):
        cost = (shift * step) ** 2
        reach = limit**2 * (1 + 1e-5) if limit is not None else float(out.max())
        if cost > reach:
            break
        for here, there in ((0, shift), (shift, 0)):
            near = out.narrow(axis, here, n - shift)
            torch.minimum(near, d2.narrow(axis, there, n - shift) + cost, out=near)
    return out


def boundary_distance(
    target: Tensor, *, max_distance: float | None, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Float32 (N, 1, *spatial) on the target's device; +inf without a boundary or beyond `max_distance`."""
    d2 = torch.where(boundary_voxels(target, ignore_index), 0.0, math.inf)
    limit = None if max_distance is None or math.isinf(max_distance) else max_distance
    for axis, step in enumerate(spacing, 1):
        d2 = _shrink(d2, axis, step, limit)
    d = d2.sqrt_()
    if limit is not None:
        d.masked_fill_(d > limit, math.inf)
    return d.unsqueeze(1)
