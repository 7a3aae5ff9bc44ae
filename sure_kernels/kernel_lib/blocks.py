"""Flat volumes as compiled kernels take them: whole blocks, as contiguous tensors (C, BLOCK) with C >= LEAST.

Inside a kernel they are flat again: what it gains from the blocks is a length that vectors divide. Sums are partial
sums of a slab, added in float64. What is no multiple of a block, or not contiguous, is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sure_kernels.kernel_lib.chunks import BLOCK

# Inductor's sums want more than 4096 numbers, and would make another kernel for fewer.
LEAST = 8
# Blocks that a kernel is given at a time: few enough for copies to stay in the cache and for float32 sums to keep
# their digits, enough for the call not to count.
_SLAB = 256
# Blocks of the example that kernels are compiled on.
EXAMPLE = 64


def spans(v: int, slab: int = _SLAB) -> Iterator[slice]:
    """Slices that cover v voxels: of `slab` whole blocks, LEAST or more at the end, and then what is left over."""
    blocks = v // BLOCK if v >= LEAST * BLOCK else 0
    start = 0
    while start < blocks:
        # A few blocks left over go with those before them.
        stop = blocks if start + slab + LEAST > blocks else start + slab
        yield slice(start * BLOCK, stop * BLOCK)
        start = stop
    if blocks * BLOCK < v:
        yield slice(blocks * BLOCK, v)


def length(span: slice) -> int:
    """Blocks that a kernel is given for a slice."""
    return max(LEAST, -(-(span.stop - span.start) // BLOCK))


def _in_place(row: Tensor, span: slice) -> bool:
    voxels = span.stop - span.start
    return row.stride(-1) == 1 and voxels % BLOCK == 0 and voxels >= LEAST * BLOCK


def _room(row: Tensor, span: slice) -> Tensor:
    return row.new_empty(length(span) * BLOCK)


def read(row: Tensor, span: slice, beyond: float = 0.0) -> Tensor:
    """The voxels `span` of row (V,) as blocks; `beyond` fills what is missing from the last one."""
    if _in_place(row, span):
        return row[span].view(-1, BLOCK)
    voxels = span.stop - span.start
    copy = _room(row, span)
    copy[:voxels] = row[span]
    copy[voxels:] = beyond
    return copy.view(-1, BLOCK)


def target(row: Tensor, span: slice) -> Tensor:
    """Blocks to write the voxels `span` of row (V,) to: the row's own memory, or a copy for `store`."""
    return (row[span] if _in_place(row, span) else _room(row, span)).view(-1, BLOCK)


def store(blocks: Tensor, row: Tensor, span: slice) -> None:
    """Write what `target` made to the row, where it was a copy."""
    if not _in_place(row, span):
        row[span] = blocks.flatten()[: span.stop - span.start]
