"""Gradient magnitude with its gradient in closed form; nothing but the image is kept for backward.

Forward, per axis d: D_d = (difference along d, smoothing along the others) applied to the padded image, and
g = sqrt(sum_d D_d^2 + eps^2). Backward: the adjoint of the same 3-tap filters, border included, applied to
upstream * D_d / g (0 where g is 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.taps import SMOOTHING


def _beyond(x: Tensor, axis: int, edge: int, inner: int, mode: str) -> Tensor | float:
    """What lies beyond entry `edge` of `axis`, whose inner neighbour is `inner`."""
    if mode == "zeros":
        return 0.0
    if mode == "replicate" or x.shape[axis] == 1:
        return x.narrow(axis, edge, 1)
    if mode == "reflect":
        return x.narrow(axis, inner, 1)
    return 2 * x.narrow(axis, edge, 1) - x.narrow(axis, inner, 1)


def _difference(x: Tensor, axis: int, scale: float, mode: str) -> Tensor:
    """scale (x[i + 1] - x[i - 1]), with x extended by `mode`."""
    n = x.shape[axis]
    out = torch.empty_like(x)
    if n > 2:
        torch.sub(x.narrow(axis, 2, n - 2), x.narrow(axis, 0, n - 2), out=out.narrow(axis, 1, n - 2))
    if n == 1:
        return out.zero_()  # the same value, or 0, on both sides
    out.narrow(axis, 0, 1).copy_(x.narrow(axis, 1, 1) - _beyond(x, axis, 0, 1, mode))
    out.narrow(axis, n - 1, 1).copy_(_beyond(x, axis, n - 1, n - 2, mode) - x.narrow(axis, n - 2, 1))
    return out.mul_(scale)


def _smooth(x: Tensor, axis: int, side: float, centre: float, mode: str) -> Tensor:
    """side x[i - 1] + centre x[i] + side x[i + 1], with x extended by `mode`."""
    n = x.shape[axis]
    out = x * centre
    if n > 1:
        out.narrow(axis, 1, n - 1).add_(x.narrow(axis, 0, n - 1), alpha=side)
        out.narrow(axis, 0, n - 1).add_(x.narrow(axis, 1, n - 1), alpha=side)
    for edge, inner in ((0, 1), (n - 1, n - 2)):
        out.narrow(axis, edge, 1).add_(_beyond(x, axis, edge, inner, mode), alpha=side)
    return out


def _adjoint(y: Tensor, axis: int, left: float, centre: float, right: float, mode: str) -> Tensor:
    """Transpose of out[i] = left x[i - 1] + centre x[i] + right x[i + 1] with x extended by `mode`."""
    n = y.shape[axis]
    x = y * centre
    if n > 1:
        x.narrow(axis, 0, n - 1).add_(y.narrow(axis, 1, n - 1), alpha=left)
        x.narrow(axis, 1, n - 1).add_(y.narrow(axis, 0, n - 1), alpha=right)
    # What out[0] took from beyond the left end, and out[n - 1] from beyond the right end.
    for edge, inner, tap in ((0, 1, left), (n - 1, n - 2, right)):
        spill = y.narrow(axis, edge, 1)
        if mode == "replicate" or (mode != "zeros" and n == 1):
            x.narrow(axis, edge, 1).add_(spill, alpha=tap)
        elif mode == "reflect":
            x.narrow(axis, inner, 1).add_(spill, alpha=tap)
        elif mode == "extrapolate":
            x.narrow(axis, edge, 1).add_(spill, alpha=2 * tap)
            x.narrow(axis, inner, 1).sub_(spill, alpha=tap)
    return x


def _components(x: Tensor, operator: str, spacing: tuple[float, ...], mode: str) -> list[Tensor]:
    """The derivative along each spatial axis, smoothed along the others."""
    axes = range(2, x.ndim)
    side, centre = SMOOTHING[operator]
    result = []
    for axis, step in zip(axes, spacing, strict=True):
        d = _difference(x, axis, 0.5 / step, mode)
        for other in axes:
            if other != axis and side > 0:
                d = _smooth(d, other, side, centre, mode)
        result.append(d)
    return result


def forward(image: Tensor, operator: str, spacing: tuple[float, ...], mode: str, reduction: str, eps: float) -> Tensor:
    """(N, M, *spatial) -> (N, 1, *spatial), float32 (float64 for float64 images)."""
    x = image if image.dtype == torch.float64 else image.float()
    squares: Tensor | None = None
    for d in _components(x, operator, spacing, mode):
        squares = d.square_() if squares is None else squares.add_(d.square_())
    assert squares is not None
    return _reduce(squares, reduction).add_(eps * eps).sqrt_()


def _reduce(squares: Tensor, reduction: str) -> Tensor:
    """Squared magnitude over channels, (N, 1, *spatial)."""
    if reduction == "l2":
        return squares.sum(1, keepdim=True)
    if reduction == "max":
        return squares.amax(1, keepdim=True)
    return squares.sqrt().mean(1, keepdim=True).square_()


def backward(
    grad: Tensor,
    image: Tensor,
    operator: str,
    spacing: tuple[float, ...],
    mode: str,
    reduction: str,
    eps: float,
) -> Tensor:
    """Gradient with respect to the image, in its dtype."""
    x = image if image.dtype == torch.float64 else image.float()
    components = _components(x, operator, spacing, mode)
    squares = torch.stack([d.square() for d in components]).sum(0)
    reduced = _reduce(squares, reduction)
    g = (reduced + eps * eps).sqrt()
    # weight = dL / d(D_d) / D_d, per channel.
    scaled = torch.where(g > 0, grad.to(x.dtype) / torch.where(g > 0, g, 1.0), 0.0)
    if reduction == "l2":
        weight = scaled.expand_as(squares)
    elif reduction == "max":
        winner = squares.argmax(1, keepdim=True)
        weight = torch.zeros_like(squares).scatter_(1, winner, scaled)
    else:
        magnitude = squares.sqrt()
        share = scaled * reduced.sqrt() / x.shape[1]
        weight = torch.where(magnitude > 0, share / torch.where(magnitude > 0, magnitude, 1.0), 0.0)
    side, centre = SMOOTHING[operator]
    axes = range(2, x.ndim)
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for axis, step, d in zip(axes, spacing, components, strict=True):
        y = weight * d
        for other in reversed(axes):
            if other != axis and side > 0:
                y = _adjoint(y, other, side, centre, side, mode)
        result += _adjoint(y, axis, -0.5 / step, 0.0, 0.5 / step, mode)
    return result.to(image.dtype)
