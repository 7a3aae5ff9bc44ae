"""Labels, mask and band in one small integer a voxel: what the closed forms keep for backward.

The low bits hold the label (all ones: the voxel does not count), the two bits above them the band. Up to 62 classes
take a byte, more take two; up to 14 classes without a band take half a byte: of each block of voxels (see `chunks`)
the first half stands in the low bits and the second half in the high ones, so that either is read in one go.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import BLOCK
from sure_kernels.kernel_lib.custom_op import custom_op

# Band values: what a voxel's distance to the nearest boundary makes it.
BETWEEN, NEAR, BOUNDARY, FAR = 0, 1, 2, 3
# Voxels packed at a time, so that the temporaries stay in the cache.
_PIECE = 32 * BLOCK


def counted_voxels(target: Tensor, ignore_index: int, mask: Tensor | None = None) -> Tensor:
    """Where `target` is not `ignore_index` and the boolean `mask` of its shape, if there is one, is set.

    The target's dtype need not hold the index (torch would wrap it around).
    """
    limits = torch.iinfo(target.dtype)
    if not limits.min <= ignore_index <= limits.max:
        return torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    counted = target != ignore_index
    return counted if mask is None else counted & mask


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


class Code(NamedTuple):
    """How a voxel's integer is made: `bits` of the label, and whether the bits above hold a band."""

    bits: int
    banded: bool

    @property
    def halved(self) -> bool:
        """Whether two voxels share a byte."""
        return self.bits == 4

    @property
    def ignored(self) -> int:
        return (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int16 if self.bits == 13 else torch.uint8


def code_for(k: int, banded: bool) -> Code:
    if k <= 14 and not banded:
        return Code(4, banded)
    return Code(6 if k <= 62 else 13, banded)


@custom_op("sure_kernels::pack_labels")
def pack_labels(target: Tensor, mask: Tensor | None, band: Tensor | None, k: int, ignore_index: int) -> Tensor:
    """Codes of `target`, `mask` and `band`, each (N, *spatial): (N, V), or half a block of bytes for every block.

    A label outside [0, k) that is not ignored matches no class (value checks report it where they run).
    """
    code = code_for(k, band is not None)
    target = target.flatten(1)
    n, v = target.shape
    # What is beyond the volume in its last block does not count.
    codes = target.new_full(_packed_shape(n, v, code), 0xFF if code.halved else 0, dtype=code.dtype)
    mask, band = (None if x is None else x.flatten(1) for x in (mask, band))
    step = _PIECE if target.device.type == "cpu" else -(-v // BLOCK) * BLOCK
    for start in range(0, v, step):
        piece = slice(start, min(start + step, v))
        packed = _pack(target[:, piece], mask, band, piece, code, k, ignore_index)
        if code.halved:
            whole = packed.shape[1] // BLOCK * BLOCK
            to = codes[:, start // 2 :]
            _pair_up(packed[:, :whole], to)
            if whole < packed.shape[1]:
                last = torch.full((n, BLOCK), code.ignored, dtype=code.dtype, device=target.device)
                last[:, : packed.shape[1] - whole] = packed[:, whole:]
                _pair_up(last, to[:, whole // 2 :])
        else:
            codes[:, piece] = packed
    return codes


def _packed_shape(n: int, v: int, code: Code) -> tuple[int, int]:
    return (n, -(-v // BLOCK) * BLOCK // 2) if code.halved else (n, v)


@pack_labels.register_fake
def _(target, mask, band, k, ignore_index):
    code = code_for(k, band is not None)
    return target.new_empty(_packed_shape(len(target), target[0].numel(), code), dtype=code.dtype)


def _pack(
    target: Tensor, mask: Tensor | None, band: Tensor | None, piece: slice, code: Code, k: int, ignore_index: int
) -> Tensor:
    """One code a voxel; comparisons and masks in torch are several times slower than arithmetic on bytes."""
    # Clamped before it is narrowed: a label that does not fit must not turn into one that does. -1 and k match no
    # class, and nor does ignored - 1, which -1 becomes.
    limits = torch.iinfo(target.dtype)
    codes = target.clamp(max(-1, limits.min), min(k, limits.max)).to(code.dtype)
    if code.dtype == torch.int16:
        codes &= code.ignored
    codes.clamp_(max=code.ignored - 1)
    if band is not None:
        codes += band[:, piece].to(code.dtype) << code.bits
    if limits.min <= ignore_index <= limits.max:
        _ignore(codes, target == ignore_index, code)
    if mask is not None:
        _ignore(codes, ~mask[:, piece], code)
    return codes


def _ignore(codes: Tensor, where: Tensor, code: Code) -> None:
    """Set codes to `ignored`, the bits of the band to 0."""
    flags = where.view(torch.uint8).to(codes.dtype)
    codes *= 1 - flags
    codes += flags * code.ignored


def _pair_up(codes: Tensor, out: Tensor) -> None:
    """Write the codes of whole blocks, halved, to the beginning of `out`."""
    blocks = codes.unflatten(1, (-1, 2, BLOCK // 2))
    half = codes.shape[1] // 2
    torch.add(blocks[:, :, 0], blocks[:, :, 1], alpha=16, out=out[:, :half].unflatten(1, (-1, BLOCK // 2)))


def unpack_labels(codes: Tensor, voxels: slice, k: int, banded: bool) -> Tensor:
    """The labels of some voxels of one image's codes, from the beginning of a block on.

    That of a voxel that does not count is `code_for(k, banded).ignored`, which matches no class.
    """
    code = code_for(k, banded)
    if not code.halved:
        return codes[voxels] & code.ignored
    first, last = voxels.start // BLOCK, -(-voxels.stop // BLOCK)
    pairs = codes[first * BLOCK // 2 : last * BLOCK // 2].unflatten(0, (-1, 1, BLOCK // 2))
    return torch.cat((pairs & code.ignored, pairs >> code.bits), 1).flatten()[: voxels.stop - voxels.start]


def unpack_band(codes: Tensor, voxels: slice, k: int) -> Tensor:
    """The band of some voxels of one image's codes; 0 where a voxel does not count."""
    return codes[voxels] >> code_for(k, banded=True).bits
