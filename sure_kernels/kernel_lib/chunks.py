"""Sweeping a volume in pieces: the closed forms never hold more than a cache-sized share of temporaries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Voxels of a block: pieces begin where one begins, and compiled kernels make one partial sum of each.
BLOCK = 1024
# Measured on two CPU cores: pieces of 32k voxels still fit the second-level cache, and torch does not share out among
# threads what is no larger, which costs more than it brings on so few cores.
_PIECE, _MANY_THREADS = 1 << 15, 4
# Classes from which on a piece is made shorter, so that what is kept of each of them still fits.
_MANY_CLASSES = 8
# Numbers of a piece of `blocks`, of all its maps: measured on two CPU cores, a second-level cache of 1 MiB each.
CPU_ELEMENTS = 1 << 19
# On a GPU launches cost more than memory does.
GPU_ELEMENTS = 1 << 26

# Images and voxels of a piece.
Place = tuple[slice, slice]


def flat(x: Tensor) -> Tensor:
    """(N, C, *spatial) as (N, C, V): a view for contiguous and channels-last layouts."""
    return x.flatten(2)


def voxel_slices(x: Tensor) -> Iterator[tuple[int, slice]]:
    """(n, slice) pairs that cover the (N, K, V) map `x` in pieces of whole blocks."""
    n, k, v = x.shape
    if x.device.type != "cpu":
        step = GPU_ELEMENTS // k
    else:
        threads = torch.get_num_threads()
        step = _PIECE if threads < _MANY_THREADS else _PIECE * threads
        step = step * _MANY_CLASSES // max(k, _MANY_CLASSES)
    step = max(BLOCK, step // BLOCK * BLOCK)
    for image in range(n):
        for start in range(0, v, step):
            yield image, slice(start, min(start + step, v))


def blocks(x: Tensor, rows: int) -> Iterator[Place]:
    """(images, voxels) that cover the (N, V) map `x`, of small images several at a time, the largest piece first;
    `rows` maps are gone through."""
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


# Up to so many numbers torch works in the calling thread.
SERIAL_ELEMENTS = (1 << 15) - 1


def serial_slices(x: Tensor, maps: int) -> Iterator[tuple[int, slice]]:
    """(n, slice) pairs that cover the (N, ..., V) map `x`: steps on `maps` numbers a voxel stay in one thread.

    For sweeps of many short steps: starting and joining threads for each would cost more than it brings.
    """
    budget = SERIAL_ELEMENTS if x.device.type == "cpu" else GPU_ELEMENTS
    step = max(1, budget // maps)
    for image in range(len(x)):
        for start in range(0, x.shape[-1], step):
            yield image, slice(start, min(start + step, x.shape[-1]))
