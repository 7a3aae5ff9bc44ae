"""Labels, mask and band in one small integer a voxel: what the eager closed form keeps for backward.

The low bits hold the label (all ones: the voxel does not count), the two bits above them the band. Up to 62
classes take a byte, more take two.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Band values: what a voxel's distance to the nearest boundary makes it.
BETWEEN, NEAR, BOUNDARY, FAR = 0, 1, 2, 3


def counted_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """target != ignore_index, for an index that the target's dtype may not hold (torch would wrap it around)."""
    limits = torch.iinfo(target.dtype)
    if limits.min <= ignore_index <= limits.max:
        return target != ignore_index
    return torch.ones_like(target, dtype=torch.bool)


def label_bits(k: int) -> int:
    return 6 if k <= 62 else 13


def pack_labels(target: Tensor, mask: Tensor | None, band: Tensor | None, k: int, ignore_index: int) -> Tensor:
    """Codes (N, V) of `target`, `mask` and `band`, each (N, *spatial).

    A label outside [0, k) that is not ignored matches no class (value checks report it where they run).
    """
    bits = label_bits(k)
    ignored = (1 << bits) - 1
    dtype = torch.uint8 if bits == 6 else torch.int16
    # Compared before it is narrowed: a label that does not fit must not turn into one that does.
    known = target >= 0
    if k <= torch.iinfo(target.dtype).max:
        known = known & (target < k)
    codes = torch.where(known, target.to(dtype), ignored - 1)
    counted = counted_voxels(target, ignore_index)
    if mask is not None:
        counted = counted & mask
    if band is not None:
        codes = codes | (band.to(codes.dtype) << bits)
    return torch.where(counted, codes, ignored).flatten(1)


def unpack_labels(codes: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(label, counted, band) of codes; the label of a voxel that does not count matches no class."""
    bits = label_bits(k)
    ignored = (1 << bits) - 1
    label = codes & ignored
    return label, label != ignored, codes >> bits
