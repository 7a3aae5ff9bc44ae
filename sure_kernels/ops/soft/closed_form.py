"""The differentiable parts of PriUS's soft losses and their gradients: means over windows, and sums over pairs.

The sum over a window is its own adjoint, axis by axis; so the gradient of the mean is the window sum of the upstream
gradient over the numbers it was divided by. A pair contributes relu(a (u_i - b u_j)), a = sum of factor * slope:

    dL/du_i += a [a (u_i - b u_j) > 0] / sum of weights,   dL/du_j -= b times the same
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def window_sum(x: Tensor, size: int) -> Tensor:
    """Sum over a window of width `size` around each voxel of (N, 1, *spatial), 0 outside the image."""
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        out = x.clone()
        for shift in range(1, min(size // 2, n - 1) + 1):
            out.narrow(axis, 0, n - shift).add_(x.narrow(axis, shift, n - shift))
            out.narrow(axis, shift, n - shift).add_(x.narrow(axis, 0, n - shift))
        x = out
    return x


def _divisor(x: Tensor, size: int, counted: Tensor | None, official: bool) -> Tensor | float:
    if official:
        return float(size ** (x.ndim - 2))
    ones = torch.ones_like(x[:1]) if counted is None else counted.to(x.dtype)
    return window_sum(ones, size).clamp_min(1)


def window_mean(x: Tensor, size: int, counted: Tensor | None, official: bool) -> Tensor:
    """As the reference's."""
    inside = x if counted is None else torch.where(counted, x, 0.0)
    return window_sum(inside, size) / _divisor(x, size, counted, official)


def window_mean_adjoint(grad: Tensor, size: int, counted: Tensor | None, official: bool) -> Tensor:
    """dL/dx from dL/d(window_mean(x))."""
    dx = window_sum(grad / _divisor(grad, size, counted, official), size)
    return dx if counted is None else torch.where(counted, dx, 0.0)


def _slope(slopes: Tensor, factors: Sequence[float]) -> Tensor:
    """a of each pair."""
    total = slopes[0] * factors[0]
    for slope, factor in zip(slopes[1:], factors[1:], strict=True):
        total = total + slope * factor
    return total


def _step(u: Tensor, i: Tensor, j: Tensor, ratio: Tensor) -> Tensor:
    return u.index_select(0, i) - ratio * u.index_select(0, j)


def pair_sums(u: Tensor, pairs: Tensor, slopes: Tensor, ratio: Tensor, factors: Sequence[float]) -> Tensor:
    """(S,) float64: sum over active pairs of each slope times u_i - b u_j; `u` is flat."""
    i, j = pairs.unbind(1)
    step = _step(u, i, j, ratio)
    a = _slope(slopes, factors)
    # A NaN counts, where the pair does.
    step = torch.where((a != 0) & ~(a * step <= 0), step, 0.0)
    return torch.stack([(slope * step).sum().double() for slope in slopes])


def pair_gradient(
    u: Tensor, pairs: Tensor, slopes: Tensor, ratio: Tensor, factors: Sequence[float], scale: Tensor
) -> Tensor:
    """dL/du, flat; `scale` is the upstream gradient over the sum of weights."""
    i, j = pairs.unbind(1)
    a = _slope(slopes, factors)
    a = torch.where(a * _step(u, i, j, ratio) > 0, a, 0.0) * scale.to(u.dtype)
    du = torch.zeros_like(u)
    # Sorted, not atomic, on a GPU: the same bits also where pairs share a voxel.
    du.index_put_((i,), a, accumulate=True)
    return du.index_put_((j,), -ratio * a, accumulate=True)
