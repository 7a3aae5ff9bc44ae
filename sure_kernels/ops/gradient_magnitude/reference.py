"""Gradient magnitude from its definition: pad, filter each axis, take the norm."""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.taps import SMOOTHING


def _pad_axis(x: Tensor, axis: int, mode: str) -> Tensor:
    """One more entry on both sides of `axis`. An axis of length 1 has no neighbour: its value is repeated."""
    n = x.shape[axis]
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
    if mode == "zeros":
        before, after = torch.zeros_like(first), torch.zeros_like(last)
    elif mode == "replicate" or n == 1:
        before, after = first, last
    elif mode == "reflect":
        before, after = x.narrow(axis, 1, 1), x.narrow(axis, n - 2, 1)
    else:
        before = 2 * first - x.narrow(axis, 1, 1)
        after = 2 * last - x.narrow(axis, n - 2, 1)
    return torch.cat((before, x, after), axis)


def _filter_axis(x: Tensor, axis: int, taps: tuple[float, float, float], mode: str) -> Tensor:
    n = x.shape[axis]
    padded = _pad_axis(x, axis, mode)
    parts = [tap * padded.narrow(axis, i, n) for i, tap in enumerate(taps) if tap != 0]
    return torch.stack(parts).sum(0)


def gradient_magnitude(
    image: Tensor,
    operator: str = "sobel",
    spacing: tuple[float, ...] | None = None,
    padding_mode: str = "replicate",
    channel_reduction: str = "l2",
    eps: float = 0.0,
) -> Tensor:
    """Gradient magnitude (N, 1, *spatial) of `image` (N, M, *spatial), in the image's dtype (at least float32)."""
    x = image if image.dtype == torch.float64 else image.float()
    axes = range(2, x.ndim)
    spacing = spacing or (1.0,) * len(axes)
    side, centre = SMOOTHING[operator]
    squares = torch.zeros_like(x)
    for axis, step in zip(axes, spacing, strict=True):
        d = _filter_axis(x, axis, (-0.5 / step, 0.0, 0.5 / step), padding_mode)
        for other in axes:
            if other != axis and side > 0:
                d = _filter_axis(d, other, (side, centre, side), padding_mode)
        squares = squares + d.square()
    if channel_reduction == "l2":
        squares = squares.sum(1, keepdim=True)
    elif channel_reduction == "max":
        squares = squares.gather(1, squares.argmax(1, keepdim=True))
    else:
        squares = _safe_sqrt(squares).mean(1, keepdim=True).square()
    return _safe_sqrt(squares + eps**2)


def _safe_sqrt(squares: Tensor) -> Tensor:
    """sqrt whose gradient at 0 is 0 instead of infinite."""
    some = squares != 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)
