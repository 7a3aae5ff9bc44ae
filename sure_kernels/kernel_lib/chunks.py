"""Sweeping a volume in pieces: the closed forms never hold more than a cache-sized share of temporaries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Measured on two CPU cores: the temporaries of 32k voxels and 4 classes stay in the second-level cache.
CPU_ELEMENTS = 1 << 17
# On a GPU launches cost more than memory does.
GPU_ELEMENTS = 1 << 26


# Images and voxels of a piece.
Place = tuple[slice, slice]


def flat(x: Tensor) -> Tensor:
    """(N, C, *spatial) as (N, C, V): a view for contiguous and channels-last layouts."""
    return x.flatten(2)


def voxel_slices(x: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """(n, slice) pairs that cover the (N, C, V) map `x` with about `rows` temporaries a voxel in each piece."""
    budget = CPU_ELEMENTS if x.device.type == "cpu" else GPU_ELEMENTS
    step = max(1, budget // rows)
    n, _, v = x.shape
    for image in range(n):
        for start in range(0, v, step):
            yield image, slice(start, min(start + step, v))


def blocks(x: Tensor, rows: int) -> Iterator[Place]:
    """(images, voxels) that cover the (N, V) map `x`, of small images several at a time, with about `rows` temporaries
    a voxel in each piece."""
    budget = CPU_ELEMENTS if x.device.type == "cpu" else GPU_ELEMENTS
    n, v = x.shape
    step = min(v, max(1, budget // rows))
    images = max(1, budget // (rows * v))
    for first in range(0, n, images):
        for start in range(0, v, step):
            yield slice(first, min(first + images, n)), slice(start, min(start + step, v))


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
