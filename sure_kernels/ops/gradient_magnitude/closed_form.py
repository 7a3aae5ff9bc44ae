"""Gradient magnitude with its gradient in closed form; nothing but the image is kept for backward.

Forward, per axis d: D_d = (difference along d, smoothing along the others) applied to the padded image, and
g = sqrt(sum_d D_d^2 + eps^2). Backward: the adjoint of the same 3-tap filters, border included, applied to
upstream * D_d / g (0 where g is 0).

Both go through a volume in slabs of planes. A slab is padded by one voxel all round and laid out flat, so that a
neighbour along an axis is a fixed step away and a filter is arithmetic on whole runs of memory. What the filters make
of the voxels of the padding is garbage: forward leaves it behind, and backward multiplies it by an upstream gradient
of 0. `magnitude_of`, `slopes_of` and `adjoint_of` are the formulas for a slab; the compiled backend fuses the same
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.launch import as_volume, axis_scales, centre_tap
from sure_kernels.kernel_lib.special import Number, compiling

# Voxels of a slab, padding included: its dozen maps stay in the cache of two CPU cores.
_SLAB = 1 << 18
_GPU_SLAB = 1 << 26
# Less than the square root of any positive number: a magnitude is 0 or more than this.
_LESS_THAN_ANY = {torch.float32: 1e-23, torch.float64: 1e-162}


class Filters(NamedTuple):
    """The filters of a padded slab: steps in memory along the axes, factors that turn differences into derivatives per
    unit spacing, and the centre tap of the smoothing in units of the side tap (0: no smoothing)."""

    steps: Sequence[int]
    scales: Sequence[Number]
    centre: float


class Formulas(NamedTuple):
    """What runs on a slab: the functions of this module, or kernels made of them, and a slab's size."""

    magnitude: Callable[..., Tensor]
    slopes: Callable[..., None]
    adjoint: Callable[..., Tensor]
    slab: int


def _around(x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The neighbour before, the voxel and the neighbour after, of every voxel that has both."""
    n = x.shape[0] - 2 * step
    return x[:n], x[step : step + n], x[2 * step :]


def _smoothed(x: Tensor, step: int, centre: float) -> Tensor:
    before, here, after = _around(x, step)
    return here if centre == 0 else (before + after).add_(here, alpha=centre)


def _difference(x: Tensor, step: int) -> Tensor:
    before, _, after = _around(x, step)
    return after - before


def components_of(x: Tensor, filters: Filters) -> list[Tensor]:
    """Differences along each axis, last axis first, smoothed along the others; shorter than x by every step twice."""
    found: list[Tensor] = []
    for axis, step in reversed(list(enumerate(filters.steps))):
        found = [_smoothed(d, step, filters.centre) for d in found]
        found.append(_difference(x, step))
        if axis > 0:
            x = _smoothed(x, step, filters.centre)
    return found


def adjoint_of(slopes: Sequence[Tensor], filters: Filters) -> Tensor:
    """The transpose of `components_of`, for derivatives by the differences that are 0 beyond the slab."""
    first, *rest = reversed(slopes)
    before, _, after = _around(first, filters.steps[0])
    result = before - after
    for step_before, step in zip(filters.steps[:-1], filters.steps[1:], strict=True):
        rest = [_smoothed(x, step_before, filters.centre) for x in rest]
        before, _, after = _around(rest.pop(0), step)
        result = _smoothed(result, step, filters.centre) + (before - after)
    return result


def _squares(components: Sequence[Tensor], filters: Filters) -> Tensor:
    """The squared magnitude of one channel."""
    result: Tensor | None = None
    for d, scale in zip(components, reversed(filters.scales), strict=True):
        if result is None:
            result = (d * scale).square()
        elif isinstance(scale, Tensor):
            result = result + (d * scale).square()
        else:
            result.addcmul_(d, d, value=scale * scale)
    assert result is not None
    return result


def _reduced(squares: Sequence[Tensor], reduction: str) -> Tensor:
    """The squared magnitude over channels."""
    result = squares[0]
    if len(squares) == 1:
        return result
    if reduction == "mean":
        return (sum((x.sqrt() for x in squares[1:]), result.sqrt()) / len(squares)).square()
    for x in squares[1:]:
        result = torch.maximum(result, x) if reduction == "max" else result + x
    return result


def magnitude_of(x: Sequence[Tensor], filters: Filters, reduction: str, eps_square: Number) -> Tensor:
    """The gradient magnitude of a slab, from its channels."""
    squares = [_squares(components_of(c, filters), filters) for c in x]
    return (_reduced(squares, reduction) + eps_square).sqrt()


def slopes_of(
    x: Sequence[Tensor],
    upstream: Tensor,
    filters: Filters,
    reduction: str,
    eps_square: Number,
    out: Sequence[Sequence[Tensor]],
) -> None:
    """Write to `out` the derivatives by the differences of each channel, from the magnitude's upstream gradient."""
    components = [components_of(c, filters) for c in x]
    squares = [_squares(d, filters) for d in components]
    reduced = _reduced(squares, reduction)
    weight = _ratio(upstream, (reduced + eps_square).sqrt())
    if reduction == "mean":
        share = weight * reduced.sqrt() / len(x)
        weights = [_ratio(share, square.sqrt()) for square in squares]
    elif reduction == "max" and len(x) > 1:
        # The first of the largest, as argmax has it.
        weights, left = [], weight
        for square in squares:
            won = (square == reduced).to(weight.dtype)
            weights.append(left * won)
            left = left * (1 - won)
    else:
        weights = [weight] * len(x)
    for weight, found, rooms in zip(weights, components, out, strict=True):
        for d, scale, room in zip(found, reversed(filters.scales), rooms, strict=True):
            factor = weight * (scale * scale)
            if compiling():
                room.copy_(factor * d)
            else:
                torch.mul(factor, d, out=room)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y; where y is 0 some finite number, which a difference of 0 is multiplied by."""
    return x / y.clamp_min(_LESS_THAN_ANY[y.dtype])


EAGER = Formulas(magnitude_of, slopes_of, adjoint_of, _SLAB)


class _Volume:
    """An image (M, D, H, W) to go through in slabs of padded planes; two spatial axes are a volume without an axis D.

    Padded plane p is plane p - rim of the image: there is padding before and after it along D only where D is an axis.
    """

    def __init__(self, image: Tensor, ndim: int, mode: str) -> None:
        self.image, self.mode, self.dtype = image, mode, working_dtype(image.dtype)
        self.channels, self.depth, self.height, self.width = image.shape
        self.rim = 1 if ndim == 3 else 0
        self.row = self.width + 2
        self.plane = (self.height + 2) * self.row
        self.steps = (self.plane, self.row, 1)[-ndim:]
        # Entries that the filters drop at either end of a slab.
        self.margin = sum(self.steps)

    def spans(self, slab: int, halo: int, first: int, last: int) -> list[tuple[int, int]]:
        """Runs of padded planes [first, last), each with `halo` planes around it about as large as a slab."""
        if self.rim == 0:
            return [(first, last)]
        step = max(2, slab // self.plane - 2 * halo)
        return [(start, min(start + step, last)) for start in range(first, last, step)]

    def empty(self, planes: int) -> Tensor:
        return self.image.new_empty((self.channels, planes, self.height + 2, self.width + 2), dtype=self.dtype)

    def padded(self, first: int, last: int) -> Tensor:
        """Padded planes [first, last) of all channels, (M, planes * plane)."""
        x = self.empty(last - first)
        inside = x[:, :, 1:-1, 1:-1]
        low, high = max(first, self.rim), min(last, self.depth + self.rim)
        inside[:, low - first : high - first] = self.image[:, low - self.rim : high - self.rim]
        if first < self.rim:
            inside[:, 0] = self._beyond(self.image, 1, 0, 1)
        if last > self.depth + self.rim:
            inside[:, -1] = self._beyond(self.image, 1, self.depth - 1, self.depth - 2)
        for axis, n in ((2, self.height), (3, self.width)):
            x.select(axis, 0).copy_(self._beyond(x, axis, 1, 2, n))
            x.select(axis, n + 1).copy_(self._beyond(x, axis, n, n - 1, n))
        return x.flatten(1)

    def _beyond(self, x: Tensor, axis: int, edge: int, inner: int, n: int | None = None) -> Tensor:
        """What lies beyond entry `edge` of `axis`, whose inner neighbour is `inner`; an axis of length 1 has none."""
        value = x.select(axis, edge).to(self.dtype)
        if self.mode == "zeros":
            return torch.zeros_like(value)
        if self.mode == "replicate" or (x.shape[axis] if n is None else n) == 1:
            return value
        neighbour = x.select(axis, inner).to(self.dtype)
        return neighbour if self.mode == "reflect" else 2 * value - neighbour

    def fold(self, x: Tensor, axis: int, n: int) -> None:
        """Transpose of the padding along `axis`: add to the n entries of x what lies before and after them."""
        if self.mode == "zeros":
            return
        for edge, inner, outer in ((1, 2, 0), (n, n - 1, n + 1)):
            spill = x.select(axis, outer)
            if self.mode == "replicate" or n == 1:
                x.select(axis, edge).add_(spill)
            elif self.mode == "reflect":
                x.select(axis, inner).add_(spill)
            else:
                x.select(axis, edge).add_(spill, alpha=2)
                x.select(axis, inner).sub_(spill)


def _filters(volume: _Volume, operator: str, spacing: tuple[float, ...]) -> Filters:
    return Filters(volume.steps, axis_scales(operator, spacing)[3 - len(spacing) :], centre_tap(operator))


def _slab_size(image: Tensor, formulas: Formulas) -> int:
    return formulas.slab if image.device.type == "cpu" else _GPU_SLAB


def forward(
    image: Tensor,
    operator: str,
    spacing: tuple[float, ...],
    mode: str,
    reduction: str,
    eps: float,
    formulas: Formulas = EAGER,
) -> Tensor:
    """(N, M, *spatial) -> (N, 1, *spatial), float32 (float64 for float64 images)."""
    n, _, *spatial = image.shape
    result = image.new_empty((n, 1, *spatial), dtype=working_dtype(image.dtype))
    slab = _slab_size(image, formulas)
    for x, out in zip(as_volume(image), as_volume(result)[:, 0], strict=True):
        volume = _Volume(x, len(spatial), mode)
        filters, rim = _filters(volume, operator, spacing), volume.rim
        for first, last in volume.spans(slab, rim, rim, volume.depth + rim):
            channels = volume.padded(first - rim, last + rim).unbind()
            g = formulas.magnitude(channels, filters, reduction, eps * eps)
            shape, strides = (last - first, volume.height, volume.width), (volume.plane, volume.row, 1)
            out[first - rim : last - rim] = g.as_strided(shape, strides)
    return result


def backward(
    grad: Tensor,
    image: Tensor,
    operator: str,
    spacing: tuple[float, ...],
    mode: str,
    reduction: str,
    eps: float,
    formulas: Formulas = EAGER,
) -> Tensor:
    """Gradient with respect to the image, in its dtype."""
    dtype = working_dtype(image.dtype)
    result = torch.empty_like(image, dtype=dtype, memory_format=torch.contiguous_format)
    slab = _slab_size(image, formulas)
    for x, up, out in zip(as_volume(image), as_volume(grad)[:, 0], as_volume(result), strict=True):
        volume = _Volume(x, image.ndim - 2, mode)
        filters, rim = _filters(volume, operator, spacing), volume.rim
        # Derivatives by the padding planes before and after the volume.
        outside: list[Tensor] = []
        for first, last in volume.spans(slab, 2 * rim, 0, volume.depth + 2 * rim):
            dx = _slab_gradient(volume, first, last, up, filters, reduction, eps * eps, formulas)
            for axis, n in ((3, volume.width), (2, volume.height)):
                volume.fold(dx, axis, n)
            dx = dx[:, :, 1:-1, 1:-1]
            inner_first, inner_last = max(first, rim), min(last, volume.depth + rim)
            if inner_first > first:
                outside.append(dx[:, 0])
            out[:, inner_first - rim : inner_last - rim] = dx[:, inner_first - first : inner_last - first]
            if inner_last < last:
                outside.append(dx[:, -1])
        if rim:
            _fold_planes(volume, out, outside)
    return result.to(image.dtype)


def _slab_gradient(
    volume: _Volume,
    first: int,
    last: int,
    upstream: Tensor,
    filters: Filters,
    reduction: str,
    eps_square: float,
    formulas: Formulas,
) -> Tensor:
    """Derivatives by the padded planes [first, last), (M, planes, H + 2, W + 2)."""
    rim, plane, margin = volume.rim, volume.plane, volume.margin
    # Planes whose magnitudes depend on these: none of the padding's own, which stay 0.
    low, high = max(first - rim, rim), min(last + rim, volume.depth + rim)
    edge = margin - rim * plane
    slopes = [
        [volume.image.new_zeros((last - first + 2 * rim) * plane + 2 * edge, dtype=volume.dtype) for _ in volume.steps]
        for _ in range(volume.channels)
    ]
    if low < high:
        up = volume.image.new_zeros((high - low, volume.height + 2, volume.width + 2), dtype=volume.dtype)
        up[:, 1:-1, 1:-1] = upstream[low - rim : high - rim]
        channels = volume.padded(low - rim, high + rim).unbind()
        length = channels[0].numel() - 2 * margin
        start = edge + (low - (first - rim)) * plane + edge
        rooms = [[room[start : start + length] for room in to] for to in slopes]
        formulas.slopes(channels, up.flatten()[edge : edge + length], filters, reduction, eps_square, rooms)
    dx = torch.stack([formulas.adjoint(x, filters) for x in slopes])
    return dx.view(volume.channels, last - first, volume.height + 2, volume.width + 2)


def _fold_planes(volume: _Volume, out: Tensor, outside: list[Tensor]) -> None:
    """Transpose of the padding along D."""
    if volume.mode == "zeros":
        return
    n = volume.depth
    for edge, inner, spill in ((0, 1, outside[0]), (n - 1, n - 2, outside[1])):
        if volume.mode == "replicate" or n == 1:
            out[:, edge] += spill
        elif volume.mode == "reflect":
            out[:, inner] += spill
        else:
            out[:, edge].add_(spill, alpha=2)
            out[:, inner] -= spill
