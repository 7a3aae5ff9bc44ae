"""All violating pairs of sets of points in Triton: D_i and C_i of every point, sum x D and M of every set.

The quantities, and how ranks and positions turn pairs into counts and running sums, are those of `closed_form`. Two
ways, the same `pairs_kernel` in both:

- Sets of at most MOST_DIRECT points: every point meets every point of its set, ROWS x COLUMNS at a time. Nothing is
  sorted. n^2 comparisons of about 6 instructions: 0.1 ms for a set of 2^14 on an H200 (estimate; where the two ways
  cross is to be measured).
- Larger ones: three sorts by torch, then one level a bit of the rank, from the top: `split_sums_kernel` counts the
  zeros and adds up the scores of a block, `split_scan_kernel` turns the blocks of a node into what stands before each,
  `split_kernel` adds what the two halves of a node owe each other and moves every point to its half. Nodes of TILE
  points are left to `pairs_kernel`. A level reads and writes 68 bytes a point; a million points take 11 levels,
  0.75 GB or 0.2 ms on an H200 (estimate), and 0.5 billion comparisons.

Blocks start at the start of their set and TILE divides a node, so that a block lies in one node. Sums are float64 in a
fixed order, without atomics: the same input gives the same bits. Points of one set are counted in 32 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib.launch import Launch, planned, warps_on
from sure_kernels.ops.ranking.closed_form import Pairs, Sets, order_and_rank

# Largest set that is looked at pair by pair.
MOST_DIRECT = 1 << 14
# Points of the nodes that are looked at pair by pair, and of a block of the levels above them. A power of two.
TILE = 512
# Points of a program of `pairs_kernel` (divides TILE), and those that they meet at a time.
ROWS, COLUMNS = 64, 32
# Blocks that a scan or a reduction takes at a time.
CHUNK = 1024
NUM_WARPS = 4


@triton.jit
def _block(p_blocks, blocks, i_block):
    """(first slot of the set, end of the set, first slot of the block)."""
    blocks = tl.cast(blocks, tl.int64)
    return tl.load(p_blocks + i_block), tl.load(p_blocks + blocks + i_block), tl.load(p_blocks + 2 * blocks + i_block)


@triton.jit
def _number(p, o, m):
    """Values or scores as they compare: float32, or float64 where that is what they are."""
    b = tl.load(p + o, mask=m, other=0.0)
    if b.dtype == tl.float64:
        return b
    else:
        return b.to(tl.float32)


@triton.jit(do_not_specialize=["blocks"])
def pairs_kernel(
    p_key, p_score, p_value, p_place, p_difference, p_count, p_blocks, p_out, p_total, p_number,
    blocks,
    TILED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """D of ROWS points from all pairs with the points of their set, or for TILED of their tile.

    Not TILED: `p_key` and `p_score` hold values and scores. TILED: ranks and scores about the set's first, in the order
    of positions; `p_difference` and `p_count` hold what the levels above found, `p_place` where the point belongs.
    D goes to `p_out`, sums over the rows of x D and of C to `p_total` and `p_number`.
    """
    i_block = tl.program_id(0).to(tl.int64)
    start, end, first = _block(p_blocks, blocks, i_block)
    o_row = first + tl.arange(0, ROWS)  # [ROWS]
    m_row = o_row < end
    if TILED:
        begin = start + (first - start) // TILE * TILE
        stop = tl.minimum(begin + TILE, end)
        key = tl.load(p_key + o_row, mask=m_row, other=0)
        score = tl.load(p_score + o_row, mask=m_row, other=0.0)
        reference = tl.zeros([1], tl.float64)
    else:
        begin, stop = start, end
        key = _number(p_key, o_row, m_row)
        score = _number(p_score, o_row, m_row)
        reference = tl.load(p_score + start + tl.zeros([1], tl.int32)).to(tl.float64)

    count = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float64)
    for column in range(begin, stop, COLUMNS):
        o_column = tl.cast(column, tl.int64) + tl.arange(0, COLUMNS)  # [COLUMNS]
        m_column = o_column < stop
        if TILED:
            # Rank and position: they know the ties.
            other_key = tl.load(p_key + o_column, mask=m_column, other=0)
            other = tl.load(p_score + o_column, mask=m_column, other=0.0)
            above = (key[:, None] > other_key[None, :]) & (o_row[:, None] > o_column[None, :])
            below = (key[:, None] < other_key[None, :]) & (o_row[:, None] < o_column[None, :])
        else:
            other_key = _number(p_key, o_column, m_column)
            other = _number(p_score, o_column, m_column)
            above = (key[:, None] > other_key[None, :]) & (score[:, None] > other[None, :])
            below = (key[:, None] < other_key[None, :]) & (score[:, None] < other[None, :])
        pair = (above | below) & m_column[None, :]  # [ROWS, COLUMNS]
        count += tl.sum(pair.to(tl.int32), 1)
        total += tl.sum(tl.where(pair, (other.to(tl.float64) - reference)[None, :], 0.0), 1)

    difference = count.to(tl.float64) * (score.to(tl.float64) - reference) - total
    if TILED:
        difference += tl.load(p_difference + o_row, mask=m_row, other=0.0)
        count += tl.load(p_count + o_row, mask=m_row, other=0)
        place = tl.load(p_place + o_row, mask=m_row, other=0)
    else:
        place = o_row
    # What rounding left at a point that violates nothing; multiplied, so that NaN stays NaN.
    difference *= (count > 0).to(tl.float64)
    tl.store(p_out + place, difference, mask=m_row)
    value = tl.load(p_value + place, mask=m_row, other=0.0).to(tl.float64)
    value -= tl.load(p_value + start).to(tl.float64)
    tl.store(p_total + i_block, tl.sum(tl.where(m_row, value * difference, 0.0)))
    tl.store(p_number + i_block, tl.sum(tl.where(m_row, count, 0).to(tl.int64)))


@triton.jit
def reduce_kernel(p_total, p_number, p_bounds, p_set_total, p_set_number, CHUNK: tl.constexpr):
    """sum x D and M of a set from the sums of its blocks, `p_bounds`[i] to `p_bounds`[i + 1]."""
    i_set = tl.program_id(0).to(tl.int64)
    end = tl.load(p_bounds + i_set + 1)
    total = tl.zeros([CHUNK], tl.float64)
    number = tl.zeros([CHUNK], tl.int64)
    for start in range(tl.load(p_bounds + i_set), end, CHUNK):
        o = tl.cast(start, tl.int64) + tl.arange(0, CHUNK)  # [CHUNK]
        total += tl.load(p_total + o, mask=o < end, other=0.0)
        number += tl.load(p_number + o, mask=o < end, other=0)
    tl.store(p_set_total + i_set, tl.sum(total))
    # Each pair was counted at both of its points.
    tl.store(p_set_number + i_set, tl.sum(number) // 2)


@triton.jit
def _bits(p_rank, p_score, o, m, bit):
    """The bit of each point's rank (0 or 1), and the scores of zeros and of ones, [TILE] each."""
    one = (tl.load(p_rank + o, mask=m, other=0) >> bit) & 1
    score = tl.load(p_score + o, mask=m, other=0.0)
    return one, score, tl.where(one == 0, score, 0.0), tl.where(one == 1, score, 0.0)


@triton.jit(do_not_specialize=["blocks", "bit"])
def split_sums_kernel(p_rank, p_score, p_blocks, p_zeros, p_sums, blocks, bit, TILE: tl.constexpr):
    """Of a block: its number of zeros, and in `p_sums` (2, blocks) the scores of its zeros and of its ones."""
    i_block = tl.program_id(0).to(tl.int64)
    _, end, first = _block(p_blocks, blocks, i_block)
    o = first + tl.arange(0, TILE)  # [TILE]
    m = o < end
    one, _, zeros, ones = _bits(p_rank, p_score, o, m, bit)
    tl.store(p_zeros + i_block, tl.sum(tl.where(m, 1 - one, 0)).to(tl.int64))
    tl.store(p_sums + i_block, tl.sum(zeros))
    tl.store(p_sums + tl.cast(blocks, tl.int64) + i_block, tl.sum(ones))


@triton.jit(do_not_specialize=["blocks", "bit"])
def split_scan_kernel(
    p_blocks, p_zeros, p_sums, p_zeros_before, p_sums_before, p_ones,
    blocks, bit,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What stands before each block in its node, and at the node's first block the scores of all its ones.

    The program of a node's first block does the node.
    """
    i_block = tl.program_id(0).to(tl.int64)
    start, end, first = _block(p_blocks, blocks, i_block)
    s_ones = tl.cast(blocks, tl.int64)
    slots = tl.cast(2, tl.int64) << bit
    if (first - start) % slots == 0:
        stop = i_block + tl.cdiv(tl.minimum(slots, end - first), TILE)
        zeros_before = tl.zeros([1], tl.int64)
        zeros_sum = tl.zeros([1], tl.float64)
        ones_sum = tl.zeros([1], tl.float64)
        for chunk in range(i_block, stop, CHUNK):
            o = chunk + tl.arange(0, CHUNK)  # [CHUNK]
            m = o < stop
            number = tl.load(p_zeros + o, mask=m, other=0)
            zeros = tl.load(p_sums + o, mask=m, other=0.0)
            ones = tl.load(p_sums + s_ones + o, mask=m, other=0.0)
            tl.store(p_zeros_before + o, zeros_before + tl.cumsum(number) - number, mask=m)
            tl.store(p_sums_before + o, zeros_sum + tl.cumsum(zeros) - zeros, mask=m)
            tl.store(p_sums_before + s_ones + o, ones_sum + tl.cumsum(ones) - ones, mask=m)
            zeros_before += tl.sum(number)
            zeros_sum += tl.sum(zeros)
            ones_sum += tl.sum(ones)
        tl.store(p_ones + i_block + tl.arange(0, 1), ones_sum)


@triton.jit(do_not_specialize=["blocks", "bit"])
def split_kernel(
    p_rank, p_score, p_difference, p_count, p_place, p_blocks, p_zeros_before, p_sums_before, p_ones,
    p_rank_out, p_score_out, p_difference_out, p_count_out, p_place_out,
    blocks, bit,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add to each point what the other half of its node owes it, and move it to its own half."""
    i_block = tl.program_id(0).to(tl.int64)
    start, end, first = _block(p_blocks, blocks, i_block)
    o_block = tl.arange(0, TILE)  # [TILE]
    o = first + o_block
    m = o < end
    one, score, zeros, ones = _bits(p_rank, p_score, o, m, bit)
    slots = tl.cast(2, tl.int64) << bit
    node = start + (first - start) // slots * slots
    # Ranks are a permutation: the lower half of a node is full before the upper one begins.
    middle = tl.minimum(slots // 2, end - node)
    upper = tl.minimum(slots, end - node) - middle
    zeros_before = tl.load(p_zeros_before + i_block) + o_block - (tl.cumsum(one) - one)
    ones_before = o - node - zeros_before
    zeros_sum = tl.load(p_sums_before + i_block) + (tl.cumsum(zeros) - zeros)
    ones_sum = tl.load(p_sums_before + tl.cast(blocks, tl.int64) + i_block) + (tl.cumsum(ones) - ones)
    ones_sum = tl.load(p_ones + i_block - (first - node) // TILE) - ones_sum - ones
    number = tl.where(one == 1, zeros_before, upper - ones_before)
    total = tl.where(one == 1, zeros_sum, ones_sum)
    difference = tl.load(p_difference + o, mask=m, other=0.0) + (number.to(tl.float64) * score - total)
    o_out = node + tl.where(one == 1, middle + ones_before, zeros_before)
    tl.store(p_rank_out + o_out, tl.load(p_rank + o, mask=m, other=0), mask=m)
    tl.store(p_score_out + o_out, score, mask=m)
    tl.store(p_difference_out + o_out, difference, mask=m)
    tl.store(p_count_out + o_out, tl.load(p_count + o, mask=m, other=0) + number.to(tl.int32), mask=m)
    tl.store(p_place_out + o_out, tl.load(p_place + o, mask=m, other=0), mask=m)


def _blocks(sizes: list[int], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, blocks): start and end of a block's set, its first slot; (sets + 1,): where the blocks of each set begin."""
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    number = (size + block - 1) // block
    end = size.cumsum(0)
    bounds = torch.cat((number.new_zeros(1), number.cumsum(0)))
    start = (end - size).repeat_interleave(number)
    first = start + (torch.arange(int(bounds[-1]), device="cpu") - bounds[:-1].repeat_interleave(number)) * block
    return _moved(torch.stack((start, end.repeat_interleave(number), first)), device), _moved(bounds, device)


def _moved(table: Tensor, device: torch.device) -> Tensor:
    """On the device, for which the host does not wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@planned
def _pairs(blocks: int, tiled: bool, device: torch.device) -> Launch:
    warps = warps_on(NUM_WARPS, device)
    options = {"TILED": tiled, "TILE": TILE, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": warps}
    return Launch(pairs_kernel, (blocks,), (blocks,), options)


def violating_pairs(sets: Sets) -> Pairs:
    """`closed_form.violating_pairs`, for values in 32 or 16 bits. Without mask and groups the host does not wait.

    Raises ValueError for a set of 2^31 points or more.
    """
    sizes = sets.sizes.tolist() if sets.index is not None else [len(sets.value) // sets.rows] * sets.rows
    if max(sizes, default=0) >= 2**31:
        raise ValueError(f"values: expected fewer than 2^31 counted points in a set, got {max(sizes)}")
    device = sets.value.device
    tiled = max(sizes, default=0) > MOST_DIRECT
    warps = warps_on(NUM_WARPS, device)
    value, score = sets.value.contiguous(), sets.score.contiguous()
    with torch.cuda.device_of(value):
        if tiled:
            rank, scores, difference, count, place = _levels(sets, sizes)
        else:
            # What is only read where there are tiles.
            rank, scores, difference, count, place = value, score, value, value, value
        table, bounds = _blocks(sizes, ROWS, device)
        blocks = table.shape[1]
        out = torch.empty(len(value), dtype=torch.float64, device=device)
        total = torch.empty(blocks, dtype=torch.float64, device=device)
        number = torch.empty(blocks, dtype=torch.int64, device=device)
        set_total = torch.empty(len(sizes), dtype=torch.float64, device=device)
        set_number = torch.empty(len(sizes), dtype=torch.int64, device=device)
        if blocks:
            _pairs(blocks, tiled, device)(rank, scores, value, place, difference, count, table, out, total, number)
        if sizes:
            reduce_kernel[(len(sizes),)](total, number, bounds, set_total, set_number, CHUNK=CHUNK, num_warps=warps)
    return Pairs(out, set_total, set_number)


def _levels(sets: Sets, sizes: list[int]) -> tuple[Tensor, ...]:
    """(rank, score, D, C, place) of the points in nodes of TILE, after the levels above."""
    device = sets.value.device
    order, by_rank = order_and_rank(sets)
    local = torch.arange(len(order), device=device) - sets.spread(sets.starts)
    rank = torch.empty_like(local, dtype=torch.int32).scatter_(0, by_rank, local.to(torch.int32))
    score = sets.about_first(sets.score)[order]
    state = (rank, score, torch.zeros_like(score), torch.zeros_like(rank), order)
    other = tuple(torch.empty_like(x) for x in state)
    table, _ = _blocks(sizes, TILE, device)
    blocks = table.shape[1]
    zeros, zeros_before = torch.empty((2, blocks), dtype=torch.int64, device=device)
    sums, sums_before = torch.empty((2, 2, blocks), dtype=torch.float64, device=device)
    ones = torch.empty(blocks, dtype=torch.float64, device=device)
    grid, warps = (blocks,), warps_on(NUM_WARPS, device)
    for bit in reversed(range(TILE.bit_length() - 1, (max(sizes) - 1).bit_length())):
        split_sums_kernel[grid](*state[:2], table, zeros, sums, blocks, bit, TILE=TILE, num_warps=warps)
        split_scan_kernel[grid](
            table, zeros, sums, zeros_before, sums_before, ones, blocks, bit,
            TILE=TILE, CHUNK=CHUNK, num_warps=warps,
        )  # fmt: skip
        split_kernel[grid](
            *state, table, zeros_before, sums_before, ones, *other, blocks, bit, TILE=TILE, num_warps=warps
        )
        state, other = other, state
    return state


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    types = {
        **dict.fromkeys(("p_rank", "p_rank_out", "p_count", "p_count_out"), "*i32"),
        **dict.fromkeys(("p_score", "p_score_out", "p_difference", "p_difference_out", "p_out"), "*fp64"),
        **dict.fromkeys(("p_total", "p_sums", "p_sums_before", "p_ones", "p_set_total"), "*fp64"),
        **dict.fromkeys(("p_place", "p_place_out", "p_blocks", "p_bounds"), "*i64"),
        **dict.fromkeys(("p_number", "p_zeros", "p_zeros_before", "p_set_number"), "*i64"),
        "blocks": "i32",
        "bit": "i32",
    }

    def plain(kernel: Any, **constants: int) -> Any:
        named = {name: types[name] for name in kernel.arg_names if name in types}
        return lambda f: Arguments(named, constants, NUM_WARPS)

    def pairs(f: Flags) -> Arguments:
        named = {name: types.get(name, "*i32") for name in pairs_kernel.arg_names if not name.isupper()}
        named["p_value"] = pointer_type(f["dtype"])
        if not f["tiled"]:
            unused = dict.fromkeys(("p_key", "p_place", "p_difference", "p_count"), pointer_type(f["dtype"]))
            named |= unused | {"p_score": "*fp64" if f["scores"] == "float64" else pointer_type(f["scores"])}
        constants = {"TILED": f["tiled"], "TILE": TILE, "ROWS": ROWS, "COLUMNS": COLUMNS}
        return Arguments(named, constants, NUM_WARPS)

    dtypes = ("float32", "bfloat16", "float16")
    flags: dict[str, tuple[Any, ...]] = {"tiled": (False, True), "dtype": dtypes, "scores": (*dtypes, "float64")}
    op = "pairwise_ranking_loss"
    return [
        # Scores of tiles are float64 whatever they were.
        KernelCases(pairs_kernel, op, "forward", flags, pairs, lambda f: not f["tiled"] or f["scores"] == "float64"),
        KernelCases(reduce_kernel, op, "forward", {}, plain(reduce_kernel, CHUNK=CHUNK)),
        KernelCases(split_sums_kernel, op, "forward", {}, plain(split_sums_kernel, TILE=TILE)),
        KernelCases(split_scan_kernel, op, "forward", {}, plain(split_scan_kernel, TILE=TILE, CHUNK=CHUNK)),
        KernelCases(split_kernel, op, "forward", {}, plain(split_kernel, TILE=TILE)),
    ]
