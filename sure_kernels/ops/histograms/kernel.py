"""The histograms in Triton: every program counts its voxels in registers, and a second sum adds the programs up.

A histogram of 4096 bins is a product of matrices. With the bin of voxel v written as 64 h_v + l_v and its flag f_v,

    counts[64 f + h, l] = sum_v [64 f_v + h_v = 64 f + h] [l_v = l]

is one `tl.dot` of two matrices of zeros and ones: 128 x BLOCK and BLOCK x 64, accumulated in float32 registers, where a
program's counts stay exact. No atomics, no bins in shared memory, the same bits every time. `tl.histogram` would cost
128 times (bins of a lane) 9 instructions a voxel; this costs the 192 comparisons that make the matrices.

Reliability bins are few: a lane compares its voxel with all of them and keeps the sums of confidence, hits and voxels,
float32 over SPAN blocks and float64 beyond.

One kernel, and MODE says what a row of the grid looks at:

    class   p_k of one image and class; hit where the label is k
    top     the largest p of one image; hit where it is the label
    error   the uncertainty of one image against the errors of one class, or of all (the last row)
    given   values and flags as they are

Neighbouring programs are the rows of the same voxels, so that of the K (K + 5) loads of probabilities a voxel all but
K come from cache. Floor: 4 K + 4 bytes a voxel and its label, read once (float32, K = 4: 21 bytes with 8-bit labels, 82
microseconds for 256^3 on an H200); comparisons, not bytes, are the cost: (2 K + 3) rows of about 700 instructions a
voxel, 4 ms (estimates).

With a NaN among an image's probabilities its other sums have no meaning, here as elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib.chunks import flat
from sure_kernels.kernel_lib.launch import cdiv
from sure_kernels.ops.histograms.reference import (
    BINS,
    HALF,
    MANTISSA_BITS,
    OCTAVES,
    RELIABILITY_RANGE,
    STEPS,
    THRESHOLDS,
)

_HALF = tl.constexpr(HALF)
_STEPS = tl.constexpr(STEPS)
_THRESHOLDS = tl.constexpr(THRESHOLDS)
_RANGE = tl.constexpr(RELIABILITY_RANGE)
_SHIFT = tl.constexpr(23 - MANTISSA_BITS)
_FIRST_OCTAVE = tl.constexpr((127 - OCTAVES - 1 << MANTISSA_BITS) - STEPS)
_LINEAR = tl.constexpr(2.0 ** (OCTAVES + 1 + MANTISSA_BITS))
# A fine bin is _COLUMNS times its row plus its column.
_ROWS, _COLUMNS = tl.constexpr(64), tl.constexpr(64)
_COLUMN_BITS = tl.constexpr(6)
assert BINS <= _ROWS.value * _COLUMNS.value

CLASS, TOP, ERROR, GIVEN = "class", "top", "error", "given"
# Voxels that a program looks at together, and how many times before it adds to float64.
BLOCK, SPAN = 128, 32
NUM_WARPS = 8
# Programs of a row, unless a program would then count past what float32 holds exactly.
PROGRAMS = 64
MOST_VOXELS = 1 << 23
# Reliability bins that a lane holds: the next power of two, or several launches.
FEWEST_BINS, MOST_BINS = 16, 32
# Columns of p_sums after three a reliability bin: squares, log loss, NaN.
EXTRA = 3


@triton.jit
def _magnitude_bin(v):
    """Bin of float32 values, int32, as in `closed_form`."""
    w = tl.minimum(v, 1.0 - v)
    octave = (w.to(tl.int32, bitcast=True) >> _SHIFT) - _FIRST_OCTAVE
    linear = tl.minimum(tl.maximum(w * _LINEAR, -1.0), 1.0 * _STEPS).to(tl.int32)
    half = tl.minimum(tl.maximum(tl.maximum(octave, linear), 0), _HALF - 1)
    return tl.where(v >= 0.5, 2 * _HALF - 1 - half, half)


@triton.jit
def _thresholds_below(v):
    """#{i in 1..99: i / 100 < v}: 100 v is exact in float64."""
    scaled = tl.minimum(tl.maximum(v.to(tl.float64) * 100.0, 0.0), 100.0)
    below = scaled.to(tl.int32)
    below -= (below.to(tl.float64) == scaled).to(tl.int32)
    return tl.minimum(tl.maximum(below, 0), _THRESHOLDS)


@triton.jit
def _top_label(p_value, o_voxel, m, K, s_class, BLOCK: tl.constexpr):
    """(largest probability, its class, whether one is NaN), [BLOCK] each; the first class of equals."""
    largest = tl.load(p_value + o_voxel, mask=m, other=0.0).to(tl.float32)
    broken = largest != largest
    top = tl.zeros([BLOCK], tl.int32)
    for k in range(1, K):
        v = tl.load(p_value + k * s_class + o_voxel, mask=m, other=0.0).to(tl.float32)
        broken = broken | (v != v)
        larger = v > largest
        top = tl.where(larger, k, top)
        largest = tl.where(larger, v, largest)
    return largest, top, broken


@triton.jit(do_not_specialize=["voxels", "K", "rows", "blocks", "ignore_index", "num_bins", "first_bin"])
def histogram_kernel(
    p_value, p_uncertainty, p_label, p_mask, p_counts, p_sums,
    voxels, K, rows, blocks, s_image, s_class, s_voxel, s_u_image, s_u_voxel,
    ignore_index, num_bins, first_bin,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, FINE: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program counts `blocks` blocks of one row. Of `given`, K flags a value stand in `p_label`.

    p_counts: int32 (rows, programs, 2, 64, 64), written if FINE. p_sums: float64 (rows, programs, 3 BINS + 3), sums of
    confidence, hits and voxels in reliability bins from first_bin on, then squares, log loss and NaN. BINS is 1 where
    reliability is not asked for.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_chunk = i_program % rows, i_program // rows
    if MODE == "class":
        i_image, i_class = i_row // K, (i_row % K).to(tl.int32)
        p_value += i_class * tl.cast(s_class, tl.int64)
    elif MODE == "error":
        i_image, i_class = i_row // (K + 1), (i_row % (K + 1)).to(tl.int32)
    elif MODE == "given":
        i_image, i_class = i_row // K, (i_row % K).to(tl.int32)
    else:
        i_image, i_class = i_row, 0
    s_class, s_voxel = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    s_u_voxel = tl.cast(s_u_voxel, tl.int64)
    voxels = tl.cast(voxels, tl.int64)
    p_value += i_image * s_image
    p_uncertainty += i_image * s_u_image
    p_mask += i_image * voxels
    if MODE == "given":
        p_label += i_row * voxels
    else:
        p_label += i_image * voxels
    start = i_chunk * blocks * BLOCK
    end = tl.minimum(start + tl.cast(blocks, tl.int64) * BLOCK, voxels)

    o_row, o_column, o_bin = tl.arange(0, 2 * _ROWS), tl.arange(0, _COLUMNS), tl.arange(0, BINS)
    counts = tl.zeros([2 * _ROWS, _COLUMNS], tl.float32)
    confidence = tl.zeros([BINS], tl.float64)
    hits, number = confidence, confidence
    squares = tl.full((), 0.0, tl.float64)
    log_loss, undefined = squares, squares
    for o_span in range(start, end, SPAN * BLOCK):
        b_confidence = tl.zeros([BLOCK, BINS], tl.float32)
        b_hits, b_number = b_confidence, b_confidence
        b_squares = tl.zeros([BLOCK], tl.float32)
        b_log_loss, b_undefined = b_squares, b_squares
        for i in range(SPAN):
            # 1. Which voxels count, what is looked at, and its flag: [BLOCK] each.
            o = o_span + i * BLOCK + tl.arange(0, BLOCK)
            m = o < end
            label = tl.load(p_label + o, mask=m, other=0)
            counted = m
            if HAS_MASK:
                counted = counted & (tl.load(p_mask + o, mask=m, other=0) != 0)
            if MODE == "given":
                flag = label != 0
                v = tl.load(p_uncertainty + o * s_u_voxel, mask=m, other=0.0).to(tl.float32)
            else:
                counted = counted & (label != ignore_index)
            if MODE == "class":
                flag = label == i_class
                v = tl.load(p_value + o * s_voxel, mask=m, other=0.0).to(tl.float32)
            elif MODE == "top":
                v, top, broken = _top_label(p_value, o * s_voxel, m, K, s_class, BLOCK)
                flag = top == label
                b_undefined += (broken & counted).to(tl.float32)
                counted = counted & (broken == 0)
            elif MODE == "error":
                v, top, broken = _top_label(p_value, o * s_voxel, m, K, s_class, BLOCK)
                flag = tl.where(i_class == K, top != label, (top == i_class) != (label == i_class))
                counted = counted & (broken == 0)
                v = tl.load(p_uncertainty + o * s_u_voxel, mask=m, other=0.0).to(tl.float32)
            if MODE == "error" or MODE == "given":
                b_undefined += ((v != v) & counted).to(tl.float32)
            counted = counted & (v == v)
            v = tl.where(counted, v, 0.0)

            # 2. Reliability bins: every lane against all of them.
            if BINS > 1:
                b_bin = (v.to(tl.float64) * (tl.cast(num_bins, tl.float64) / _RANGE)).to(tl.int32)
                b_bin = tl.minimum(tl.maximum(b_bin, 0), num_bins - 1) - first_bin
                inside = (b_bin[:, None] == o_bin[None, :]) & counted[:, None]  # [BLOCK, BINS]
                b_confidence += tl.where(inside, v[:, None], 0.0)
                b_hits += tl.where(inside & flag[:, None], 1.0, 0.0)
                b_number += tl.where(inside, 1.0, 0.0)
            if MODE == "class":
                own = counted & flag
                gap = tl.where(counted, v - tl.where(flag, 1.0, 0.0), 0.0)
                b_squares += gap * gap
                b_log_loss -= tl.where(own, tl.log(tl.where(own, v, 1.0)), 0.0)

            # 3. Fine bins: one product of two matrices of zeros and ones.
            if FINE:
                b_code = _magnitude_bin(v)
                if MODE == "error" or MODE == "given":
                    b_code += _thresholds_below(v)
                b_row = tl.where(counted, (b_code >> _COLUMN_BITS) + tl.where(flag, _ROWS, 0), -1)
                b_left = (o_row[:, None] == b_row[None, :]).to(tl.float16)  # [128, BLOCK]
                b_right = ((b_code & (_COLUMNS - 1))[:, None] == o_column[None, :]).to(tl.float16)  # [BLOCK, 64]
                counts = tl.dot(b_left, b_right, counts)
        if BINS > 1:
            confidence += tl.sum(b_confidence.to(tl.float64), 0)
            hits += tl.sum(b_hits.to(tl.float64), 0)
            number += tl.sum(b_number.to(tl.float64), 0)
        squares += tl.sum(b_squares.to(tl.float64), 0)
        log_loss += tl.sum(b_log_loss.to(tl.float64), 0)
        undefined += tl.sum(b_undefined.to(tl.float64), 0)

    programs = tl.num_programs(0) // rows
    o_out = i_row * programs + i_chunk
    p_sums += o_out * (3 * BINS + 3)
    tl.store(p_sums + o_bin, confidence)
    tl.store(p_sums + BINS + o_bin, hits)
    tl.store(p_sums + 2 * BINS + o_bin, number)
    tl.store(p_sums + 3 * BINS, squares)
    tl.store(p_sums + 3 * BINS + 1, log_loss)
    tl.store(p_sums + 3 * BINS + 2, undefined)
    if FINE:
        p_counts += o_out * (2 * _ROWS * _COLUMNS)
        tl.store(p_counts + o_row[:, None] * _COLUMNS + o_column[None, :], counts.to(tl.int32))


class _Rows(NamedTuple):
    """What the rows of one mode add up to."""

    counts: Tensor  # int64 (rows, 2, 4096), or empty
    reliability: Tensor  # float64 (rows, 3, num_bins): confidence, hits, voxels
    squares: Tensor  # float64 (rows,), as the next two
    log_loss: Tensor
    undefined: Tensor


def _launch(
    mode: str,
    rows: int,
    k: int,
    value: Tensor,
    uncertainty: Tensor,
    label: Tensor,
    mask: Tensor | None,
    ignore_index: int = 0,
    num_bins: int = 0,
    fine: bool = True,
) -> _Rows:
    """Rows of `mode`: value (N, K, V), uncertainty (N, V), label (N, V), of `given` flags (N, K, V); mask (N, V)."""
    voxels, device = label.shape[-1], label.device
    programs = max(min(PROGRAMS, cdiv(voxels, BLOCK * SPAN)), cdiv(voxels, MOST_VOXELS))
    blocks = cdiv(cdiv(voxels, BLOCK), programs)
    shape = (rows, programs, 2, _ROWS.value * _COLUMNS.value) if fine else (rows, 0, 2, 0)
    counts = torch.empty(shape, dtype=torch.int32, device=device)
    bins = min(max(triton.next_power_of_2(num_bins), FEWEST_BINS), MOST_BINS) if num_bins else 1
    parts = []
    for first in range(0, max(num_bins, 1), bins):
        sums = torch.empty((rows, programs, 3 * bins + EXTRA), dtype=torch.float64, device=device)
        with torch.cuda.device_of(label):
            histogram_kernel[(rows * programs,)](
                value, uncertainty, label, label if mask is None else mask, counts, sums,
                voxels, k, rows, blocks, *value.stride(), *uncertainty.stride(), ignore_index, num_bins, first,
                MODE=mode, HAS_MASK=mask is not None, FINE=fine and first == 0, BINS=bins, BLOCK=BLOCK, SPAN=SPAN,
                num_warps=NUM_WARPS,
            )  # fmt: skip
        parts.append(sums.sum(1))
    reliability = torch.cat([part[:, : 3 * bins].view(rows, 3, bins) for part in parts], 2)[..., :num_bins]
    return _Rows(counts.sum(1, dtype=torch.int64), reliability, *parts[0][:, 3 * bins :].unbind(1))


def _bytes(x: Tensor) -> Tensor:
    """Booleans as the kernel reads them."""
    return x.contiguous().view(torch.uint8)


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.binary_histogram`."""
    n, c, _ = flag.shape
    mask = None if counted is None else _bytes(counted)
    rows = _launch(GIVEN, n * c, c, value[:, None], value, _bytes(flag), mask)
    return rows.counts[..., :BINS].unflatten(0, (n, c)), rows.undefined.view(n, c)[:, 0].long()


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    fine: bool,
) -> tuple[Tensor, ...]:
    """`reference.segmentation_histograms`."""
    n, k = probability.shape[:2]
    p, label = flat(probability), target.flatten(1).contiguous()
    u = p[:, 0] if uncertainty is None else uncertainty.flatten(1)
    mask = None if mask is None else _bytes(mask.flatten(1))
    of_class = _launch(CLASS, n * k, k, p, u, label, mask, ignore_index, num_bins, fine)
    of_top = _launch(TOP, n, k, p, u, label, mask, ignore_index, num_bins, fine)

    def joined(name: str) -> Tensor:
        classes, top = getattr(of_class, name), getattr(of_top, name)
        return torch.cat([classes.unflatten(0, (n, k)), top[:, None]], 1)

    loss = torch.stack([of_class.squares.view(n, k), of_class.log_loss.view(n, k)], 1)
    errors, without = joined("counts").new_zeros((n, k + 1, 2, 0)), torch.zeros_like(of_top.undefined)
    if uncertainty is not None:
        of_errors = _launch(ERROR, n * (k + 1), k, p, u, label, mask, ignore_index)
        errors = of_errors.counts[..., :BINS].unflatten(0, (n, k + 1))
        without = of_errors.undefined.view(n, k + 1)[:, -1]
    undefined = torch.stack([of_top.undefined, without], 1).long()
    return joined("reliability"), joined("counts")[..., : 2 * HALF], errors, loss, undefined


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    flags: dict[str, tuple[Any, ...]] = {
        "mode": (CLASS, TOP, ERROR, GIVEN),
        "mask": (False, True),
        "fine": (True, False),
        "bins": (1, FEWEST_BINS, MOST_BINS),
        "dtype": ("float32", "bfloat16", "float16"),
        "uncertainty": ("float32", "bfloat16", "float16"),
        "labels": ("u8", "i8", "i16", "i32", "i64"),
        "contiguous": (True, False),
    }

    def arguments(f: Flags) -> Arguments:
        types = {"p_value": pointer_type(f["dtype"]), "p_uncertainty": pointer_type(f["uncertainty"])}
        types |= {"p_label": f"*{f['labels']}", "p_mask": "*u8", "p_counts": "*i32", "p_sums": "*fp64"}
        types |= {name: "i64" for name in histogram_kernel.arg_names if name.startswith("s_")}
        numbers = ("voxels", "K", "rows", "blocks", "ignore_index", "num_bins", "first_bin")
        types |= dict.fromkeys(numbers, "i32")
        constants = {"MODE": f["mode"], "HAS_MASK": f["mask"], "FINE": f["fine"], "BINS": f["bins"]}
        constants |= {"BLOCK": BLOCK, "SPAN": SPAN}
        if f["contiguous"]:
            constants |= {"s_voxel": 1, "s_u_voxel": 1}
        return Arguments(types, constants, NUM_WARPS)

    def reachable(f: Flags) -> bool:
        if f["mode"] == GIVEN and f["labels"] != "u8":
            return False
        if f["mode"] in (ERROR, GIVEN):
            return f["fine"] and f["bins"] == 1
        return f["bins"] > 1

    return [KernelCases(histogram_kernel, "segmentation_histograms", "forward", flags, arguments, reachable)]
