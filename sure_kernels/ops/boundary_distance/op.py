"""Custom op and fake of `boundary_distance`, which has no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sure_kernels.ops.boundary_distance import closed_form


@torch.library.custom_op("sure_kernels::boundary_distance", mutates_args=())
def boundary_distance(
    target: Tensor, max_distance: float | None, spacing: Sequence[float], ignore_index: int
) -> Tensor:
    return closed_form.boundary_distance(
        target, max_distance=max_distance, spacing=tuple(spacing), ignore_index=ignore_index
    )


@boundary_distance.register_fake
def _(target, max_distance, spacing, ignore_index):
    n, *spatial = target.shape
    return target.new_empty((n, 1, *spatial), dtype=torch.float32)
