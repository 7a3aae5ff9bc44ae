"""Labels, mask and band in one small integer a voxel: what the eager closed form keeps for backward.

The low bits hold the label (all ones: the voxel does not count), the two bits above them the band. Up to 62 classes
take a byte, more take two; up to 14 classes without a band take half a byte.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Band values: what a voxel's distance to the nearest boundary makes it.
BETWEEN, NEAR, BOUNDARY, FAR = 0, 1, 2, 3


def counted_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """target != ignore_index, for an index that the target's dtype may not hold (torch would wrap it around)."""
    limits = torch.iinfo(target.dtype)
    if limits.min <= ignore_index <= limits.max:
        return target != ignore_index
    return torch.ones_like(target, dtype=torch.bool)


# Dtypes that lack most of torch's operations, and the ones with as many bits that have them.
_COMPARABLE = {
    torch.bool: torch.uint8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def comparable(target: Tensor, ignore_index: int) -> tuple[Tensor, int | None]:
    """The bits of `target` in a dtype that has minima and maxima, and `ignore_index` in it; None where it cannot occur.

    Equal labels stay equal and others different; those of unsigned dtypes may turn negative. A view, not a copy.
    """
    limits = torch.iinfo(torch.uint8 if target.dtype == torch.bool else target.dtype)
    bits = target.view(_COMPARABLE.get(target.dtype, target.dtype))
    if not limits.min <= ignore_index <= limits.max:
        return bits, None
    wrapped = ignore_index > torch.iinfo(bits.dtype).max
    return bits, ignore_index - (limits.max + 1) if wrapped else ignore_index


def _label_bits(k: int, banded: bool) -> int:
    """Bits of a label: 4 stand for two voxels a byte."""
    if k <= 14 and not banded:
        return 4
    return 6 if k <= 62 else 13


def pack_labels(target: Tensor, mask: Tensor | None, band: Tensor | None, k: int, ignore_index: int) -> Tensor:
    """Codes of `target`, `mask` and `band`, each (N, *spatial): (N, V), or (N, ceil(V / 2)) of two voxels each.

    A label outside [0, k) that is not ignored matches no class (value checks report it where they run).
    """
    bits = _label_bits(k, band is not None)
    ignored = (1 << bits) - 1
    dtype = torch.int16 if bits == 13 else torch.uint8
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
    codes = torch.where(counted, codes, ignored).flatten(1)
    if bits != 4:
        return codes
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_labels(codes: Tensor, voxels: slice, k: int, banded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(label, counted, band) of some voxels of one image's codes.

    The label of a voxel that does not count matches no class.
    """
    bits = _label_bits(k, banded)
    ignored = (1 << bits) - 1
    if bits == 4:
        first = voxels.start // 2
        pairs = codes[first : (voxels.stop + 1) // 2]
        codes = torch.stack((pairs & 15, pairs >> 4), 1).flatten()[voxels.start - 2 * first :]
        codes = codes[: voxels.stop - voxels.start]
    else:
        codes = codes[voxels]
    label = codes & ignored
    return label, label != ignored, codes >> bits
