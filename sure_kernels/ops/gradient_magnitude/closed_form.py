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
from torch.nn.functional import pad

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


def _smooth(before: Tensor, here: Tensor, after: Tensor, centre: float) -> Tensor:
    return here if centre == 0 else (before + after).add_(here, alpha=centre)


def components_of(x: Tensor, filters: Filters) -> list[Tensor]:
    """Differences along each axis, last axis first, smoothed along the others; shorter than x by every step twice."""
    found: list[Tensor] = []
    for axis, step in reversed(list(enumerate(filters.steps))):
        found = [_smooth(*_around(d, step), filters.centre) for d in found]
        before, here, after = _around(x, step)
        found.append(after - before)
        if axis > 0:
            x = _smooth(before, here, after, filters.centre)
    return found


def adjoint_of(slopes: Sequence[Tensor], filters: Filters) -> Tensor:
    """The transpose of `components_of`, for derivatives by the differences that are 0 beyond the slab."""
    first, *rest = reversed(slopes)
    before, _, after = _around(first, filters.steps[0])
    result = before - after
    for step_before, step in zip(filters.steps[:-1], filters.steps[1:], strict=True):
        rest = [_smooth(*_around(x, step_before), filters.centre) for x in rest]
        before, _, after = _around(rest.pop(0), step)
        result = _smooth(*_around(result, step), filters.centre).add_(before).sub_(after)
    return result


def _squares(components: Sequence[Tensor], filters: Filters) -> Tensor:
    """The squared magnitude of one channel."""
    result: Tensor | None = None
    for d, scale in zip(components, reversed(filters.scales), strict=True):
        if result is None:
            result = (d * scale).square_()
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
    return _root(_reduced(squares, reduction), eps_square)


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
    weight = _ratio(upstream, _root(reduced, eps_square))
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
        last, factor = None, weight
        for d, scale, room in zip(found, reversed(filters.scales), rooms, strict=True):
            if not (isinstance(scale, float) and scale == last):
                last, factor = scale, weight * (scale * scale)
            if compiling():
                room.copy_(factor * d)
            else:
                torch.mul(factor, d, out=room)


def _root(square: Tensor, eps_square: Number) -> Tensor:
    """sqrt(square + eps^2), of a `square` that may be needed again."""
    return square.sqrt() if isinstance(eps_square, float) and eps_square == 0 else (square + eps_square).sqrt()


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, in place of y; where y is 0 some finite number, which a difference of 0 is multiplied by."""
    return x / y.clamp_min_(_LESS_THAN_ANY[y.dtype])


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

    def padded(self, first: int, last: int) -> Tensor:
        """Padded planes [first, last) of all channels, (M, planes * plane)."""
        before, after = first < self.rim, last > self.depth + self.rim
        x = self.image[:, first - self.rim + before : last - self.rim - after].to(self.dtype)
        mode = "constant" if self.mode == "zeros" else "replicate"
        x = pad(x[None], (1, 1, 1, 1, int(before), int(after)), mode)[0].contiguous()
        if self.mode in ("reflect", "extrapolate"):
            for axis, n, ends in ((1, self.depth, (before, after)), (2, self.height, (1, 1)), (3, self.width, (1, 1))):
                for there, outer, inner in zip(ends, (0, -1), (2, -3), strict=True):
                    if there and n > 1:  # an axis of length 1 has no neighbour to reflect or extrapolate from
                        self._move_beyond(x.select(axis, outer), x.select(axis, inner))
        return x.flatten(1)

    def _move_beyond(self, edge: Tensor, inner: Tensor) -> None:
        """What replication put beyond an edge becomes what `mode` wants there."""
        if self.mode == "reflect":
            edge.copy_(inner)
        else:
            edge.mul_(2).sub_(inner)

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
    entries = (last - first + 2 * rim) * plane + 2 * edge
    slopes = volume.image.new_empty((volume.channels, len(volume.steps), entries), dtype=volume.dtype)
    if low < high:
        up = pad(upstream[low - rim : high - rim].to(volume.dtype), (1, 1, 1, 1))
        channels = volume.padded(low - rim, high + rim).unbind()
        length = channels[0].numel() - 2 * margin
        start = edge + (low - (first - rim)) * plane + edge
        slopes[..., :start].zero_()
        slopes[..., start + length :].zero_()
        rooms = [list(to.unbind()) for to in slopes[..., start : start + length].unbind()]
        formulas.slopes(channels, up.flatten()[edge : edge + length], filters, reduction, eps_square, rooms)
    else:
        slopes.zero_()
    dx = [formulas.adjoint(x.unbind(), filters).unsqueeze(0) for x in slopes.unbind()]
    joined = dx[0] if len(dx) == 1 else torch.cat(dx)
    return joined.view(volume.channels, last - first, volume.height + 2, volume.width + 2)


def _fold_planes(volume: _Volume, out: Tensor, outside: list[Tensor]) -> None:
    """Transpose of the padding along D."""
    if volume.mode == "zeros":
        return
    n = volume.depth
    for edge, inner, spill in ((0, 1, outside[0]), (n - 1, n - 2, outside[1])):
        if volume.mode == "replicate" or n == 1:
            out.select(1, edge).add_(spill)
        elif volume.mode == "reflect":
            out.select(1, inner).add_(spill)
        else:
            out.select(1, edge).add_(spill, alpha=2)
            out.select(1, inner).sub_(spill)
