"""Custom ops and fakes of `boundary_distance` and `boundary_band`, which have no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.ops.boundary_distance import closed_form


def _implementation(backend: str) -> ModuleType:
    """The module that computes; the kernel's is imported only here, since triton may be absent."""
    if backend == "triton":
        from sure_kernels.ops.boundary_distance import kernel

        return kernel
    return closed_form


@custom_op("sure_kernels::boundary_distance")
def boundary_distance(
    target: Tensor, max_distance: float | None, spacing: Sequence[float], ignore_index: int, backend: str
) -> Tensor:
    return _implementation(backend).boundary_distance(
        target, max_distance=max_distance, spacing=tuple(spacing), ignore_index=ignore_index
    )


@boundary_distance.register_fake
def _(target, max_distance, spacing, ignore_index, backend):
    n, *spatial = target.shape
    return target.new_empty((n, 1, *spatial), dtype=torch.float32)


@custom_op("sure_kernels::boundary_band")
def boundary_band(
    target: Tensor,
    boundary: float,
    near: float,
    far: float,
    spacing: Sequence[float],
    ignore_index: int,
    backend: str,
) -> Tensor:
    return _implementation(backend).boundary_band(
        target, boundary=boundary, near=near, far=far, spacing=tuple(spacing), ignore_index=ignore_index
    )


@boundary_band.register_fake
def _(target, boundary, near, far, spacing, ignore_index, backend):
    n, *spatial = target.shape
    return target.new_empty((n, 1, *spatial), dtype=torch.uint8)
