"""Gradient magnitude and its gradient, the formulas of `closed_form` fused by torch.compile: the `compiled` backend.

`closed_form` goes through the volume; here is what runs on a slab. Steps in memory are sizes to a kernel: they come as
the shape of a tensor that holds nothing, since torch.compile would take numbers for constants.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sure_kernels.kernel_lib.inductor import Kernel, example
from sure_kernels.kernel_lib.special import Number
from sure_kernels.ops.gradient_magnitude import closed_form
from sure_kernels.ops.gradient_magnitude.closed_form import Filters, Formulas, adjoint_of, magnitude_of, slopes_of

# Voxels of a slab, padding included.
_SLAB = 1 << 19
# A slab of the example: planes of 18 by 20.
_PLANES, _ROWS, _COLUMNS = 16, 18, 20


def _shape(steps: Sequence[int]) -> Tensor:
    """A tensor that has the steps, all but the last, which is 1, for a shape."""
    return torch.empty(1, dtype=torch.float32, device="cpu").expand(*steps[:-1])


def _tensor(numbers: Sequence[Number] | Number) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _filters(grid: Tensor, scales: Tensor, centre: float) -> Filters:
    return Filters((*grid.shape, 1), scales.unbind(), centre)


def _example(channels: int, ndim: int) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Channels of a slab, the shape of steps, scales, and the length of what the filters leave."""
    steps = (_ROWS * _COLUMNS, _COLUMNS, 1)[-ndim:]
    x = [example(_PLANES * _ROWS * _COLUMNS) for _ in range(channels)]
    grid = _shape(steps)
    for axis in range(ndim - 1):
        torch._dynamo.mark_dynamic(grid, axis)
    return x, grid, _tensor((1.0,) * ndim), len(x[0]) - 2 * sum(steps)


def _name(sweep: str, channels: int, ndim: int) -> str:
    return f"gradient_magnitude, {sweep}: {ndim} axes, {channels} channels"


@functools.cache
def _magnitude_kernel(channels: int, ndim: int, centre: float, reduction: str) -> Kernel:
    def run(x, grid, scales, eps_square):
        return magnitude_of(x, _filters(grid, scales, centre), reduction, eps_square)

    def arguments() -> list:
        x, grid, scales, _ = _example(channels, ndim)
        return [x, grid, scales, _tensor(0.0)]

    return Kernel(_name("forward", channels, ndim), run, arguments)


@functools.cache
def _slopes_kernel(channels: int, ndim: int, centre: float, reduction: str) -> Kernel:
    def run(x, upstream, grid, scales, eps_square, out):
        slopes_of(x, upstream, _filters(grid, scales, centre), reduction, eps_square, out)

    def arguments() -> list:
        x, grid, scales, length = _example(channels, ndim)
        out = [[example(length) for _ in range(ndim)] for _ in range(channels)]
        return [x, example(length), grid, scales, _tensor(0.0), out]

    return Kernel(_name("backward", channels, ndim), run, arguments)


@functools.cache
def _adjoint_kernel(ndim: int, centre: float) -> Kernel:
    def run(slopes, grid):
        return adjoint_of(slopes, Filters((*grid.shape, 1), (), centre))

    def arguments() -> list:
        slopes, grid, _, _ = _example(ndim, ndim)
        return [slopes, grid]

    return Kernel(_name("transposed filters", 1, ndim), run, arguments)


def _magnitude(x: Sequence[Tensor], filters: Filters, reduction: str, eps_square: Number) -> Tensor:
    kernel = _magnitude_kernel(len(x), len(filters.steps), filters.centre, reduction)
    return kernel(list(x), _shape(filters.steps), _tensor(filters.scales), _tensor(eps_square))


def _slopes(
    x: Sequence[Tensor],
    upstream: Tensor,
    filters: Filters,
    reduction: str,
    eps_square: Number,
    out: Sequence[Sequence[Tensor]],
) -> None:
    kernel = _slopes_kernel(len(x), len(filters.steps), filters.centre, reduction)
    numbers = _tensor(filters.scales), _tensor(eps_square)
    kernel(list(x), upstream, _shape(filters.steps), *numbers, [list(rooms) for rooms in out])


def _adjoint(slopes: Sequence[Tensor], filters: Filters) -> Tensor:
    return _adjoint_kernel(len(filters.steps), filters.centre)(list(slopes), _shape(filters.steps))


_COMPILED = Formulas(_magnitude, _slopes, _adjoint, _SLAB)
forward = functools.partial(closed_form.forward, formulas=_COMPILED)
backward = functools.partial(closed_form.backward, formulas=_COMPILED)
