"""What the launchers share: volumes and strides as kernels read them, block sizes, scales of the filters.

Block sizes come from tables, never from a tuner: they depend on the shape alone, so that the same input gives the
same bits everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sure_kernels.kernel_lib.taps import SMOOTHING

# Planes that a program of a marching kernel handles: each start costs two planes more.
_LONG_MARCH, _SHORT_MARCH = 32, 8
# From this many voxels on there are programs enough to march far.
_LARGE_VOLUME = 1 << 22


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def warps_of(number: int, lanes: int) -> int:
    """Warps of `lanes` lanes with as many threads as `number` warps of 32, for which blocks are sized; at least one."""
    return max(1, number * 32 // lanes)


@functools.cache
def warps_on(number: int, device: torch.device) -> int:
    """`warps_of` on a device: AMD's data-centre GPUs have 64 lanes a warp. 32 lanes in the interpreter."""
    lanes = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return warps_of(number, lanes)


def as_volume(x: Tensor) -> Tensor:
    """(N, C, *spatial) as a view (N, C, D, H, W), with D = 1 for two spatial axes."""
    return x.unsqueeze(2) if x.ndim == 4 else x


def march_length(voxels: int, depth: int) -> int:
    """Planes that one program of a marching kernel handles."""
    return min(depth, _LONG_MARCH if voxels >= _LARGE_VOLUME else _SHORT_MARCH)


def march_grid(volumes: int, sizes: Sequence[int], steps: int, block: int) -> tuple[int]:
    """Programs that march `steps` planes of (D, H, W) volumes, `block` voxels of a plane each."""
    d, h, w = sizes
    return (volumes * cdiv(d, steps) * cdiv(h * w, block),)


def centre_tap(operator: str) -> float:
    """The centre tap in units of the side tap; 0 where nothing is smoothed."""
    side, centre = SMOOTHING[operator]
    return centre / side if side > 0 else 0.0


def axis_scales(operator: str, spacing: tuple[float, ...]) -> tuple[float, float, float]:
    """Factors (d, h, w) that turn the unnormalised filters of `device_taps` into derivatives per unit spacing.

    Two spatial axes are h and w; the factor of d is then 0.
    """
    side, _ = SMOOTHING[operator]
    smoothed = side ** (len(spacing) - 1) if side > 0 else 1.0
    scales = [0.5 * smoothed / step for step in spacing]
    d, h, w = [0.0] * (3 - len(scales)) + scales
    return d, h, w


def gradient_format(logits: Tensor) -> torch.memory_format:
    """Memory format of a gradient: channels-last where `logits` are, contiguous otherwise."""
    channels_last = torch.channels_last if logits.ndim == 4 else torch.channels_last_3d
    if logits.is_contiguous(memory_format=channels_last) and not logits.is_contiguous():
        return channels_last
    return torch.contiguous_format
