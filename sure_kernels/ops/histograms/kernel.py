"""The histograms in Triton: every program counts its voxels in registers, and a second sum adds the programs up.

A histogram of 4096 bins is a product of matrices. With the bin of voxel v written as 64 h_v + l_v and its flag f_v,

    counts[64 f + h, l] = sum_v [64 f_v + h_v = 64 f + h] [l_v = l]

is one `tl.dot` of two matrices of zeros and ones, 128 x BLOCK and BLOCK x 64 bytes, accumulated in int32 registers. No
atomics, the same bits every time. (`tl.histogram` adds up warps with atomics in shared memory, and for so many bins
needs 9 instructions for each of the 128 bins of a lane, twice; this needs the 192 comparisons that make the matrices.)

Reliability bins are few: a lane compares its voxel with BINS_HELD of them and keeps sums of confidence, hits and
voxels, in float32 over SPAN blocks and in float64 beyond.

MODE says what a row of the grid looks at:

    class   p_k of one image and class; flagged (a hit) where the label is k
    top     the largest p of one image; flagged (a hit) where its class is the label
    error   the uncertainty of one image; flagged (wrong) as one class has it, or as the top label is (the last row)
    given   values of one image, and flags of one kind, as they are

Neighbouring programs are the rows of the same voxels, so that of K (K + 5) loads of probabilities a voxel all but K
come from cache. Floor: the probabilities, the uncertainty and the label read once, 4 K + 5 bytes a voxel in float32
with 8-bit labels: 21 bytes for K = 4, 82 microseconds for 256^3 on an H200. Comparisons cost far more than bytes.
Instructions of the main loops a voxel, and registers a thread, float32, compiled for sm_90 by Triton 3.7; no spills:

                    counts       reliability
    class         773, 167          526, 121
    top           890, 166          624, 106
    error         929, 164
    given         800, 168

That makes 11,400 a voxel for all metrics with K = 4, 8 ms for 256^3 on an H200 (estimate, 80 % of its issue rate).

With a NaN among the probabilities of an image only `undefined` is what the definition says; its other sums, of which
nothing follows, may hold the voxel.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib.chunks import flat
from sure_kernels.kernel_lib.launch import cdiv, warps_on
from sure_kernels.ops.histograms.reference import (
    BINS,
    HALF,
    MANTISSA_BITS,
    OCTAVES,
    RELIABILITY_RANGE,
    STEPS,
    THRESHOLDS,
    Parts,
)

_HALF = tl.constexpr(HALF)
_STEPS = tl.constexpr(STEPS)
_THRESHOLDS = tl.constexpr(THRESHOLDS)
_INVERSE_RANGE = tl.constexpr(1 / RELIABILITY_RANGE)
_SHIFT = tl.constexpr(23 - MANTISSA_BITS)
_FIRST_OCTAVE = tl.constexpr((127 - OCTAVES - 1 << MANTISSA_BITS) - STEPS)
_LINEAR = tl.constexpr(2.0 ** (OCTAVES + 1 + MANTISSA_BITS))
# A fine bin is _COLUMNS times its row plus its column.
_ROWS, _COLUMNS = tl.constexpr(64), tl.constexpr(64)
_COLUMN_BITS = tl.constexpr(6)
assert _ROWS.value * _COLUMNS.value >= BINS

CLASS, TOP, ERROR, GIVEN = "class", "top", "error", "given"
# Voxels that a program looks at together; how many times before a lane's float32 sums go to float64.
BLOCK, SPAN = 128, 32
COUNTS_WARPS, RELIABILITY_WARPS = 4, 8
# Programs of a row.
PROGRAMS = 64
# Reliability bins that a lane holds; more of them take several launches.
BINS_HELD = 16


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
def _largest(p_value, o_voxel, m, first, last, s_class, BLOCK: tl.constexpr):
    """(largest value of classes first ... last - 1, the first class that has it, whether one is NaN), [BLOCK] each.

    Bounds at run time, even for one class: what comes out of a loop the compiler holds once and passes around, where it
    would otherwise work out the bins of a voxel in every lane that compares them (twice the instructions, and spills).
    """
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    top = tl.full([BLOCK], 0, tl.int32)
    broken = top != 0
    for k in range(first, last):
        v = tl.load(p_value + k * s_class + o_voxel, mask=m, other=0.0).to(tl.float32)
        broken = broken | (v != v)
        larger = v > largest
        top = tl.where(larger, k, top)
        largest = tl.where(larger, v, largest)
    return largest, top, broken


@triton.jit
def _look(
    p_value, p_uncertainty, p_label, p_mask, o, m, i_image, i_class, K, voxels, s_class, s_voxel, s_u_voxel,
    ignore_index, MODE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(value, flag, whether the voxel counts, whether it would but for a NaN), [BLOCK] each; see MODE above."""
    first, last = i_class, i_class + 1
    if MODE == "top" or MODE == "error":
        first, last = 0, K
    label = tl.load(p_label + o, mask=m, other=0)
    counted = m
    if HAS_MASK:
        counted = counted & (tl.load(p_mask + i_image * voxels + o, mask=m, other=0) != 0)
    if MODE != "given":
        counted = counted & (label != ignore_index)
    v, top, broken = _largest(p_value, o * s_voxel, m, first, last, s_class, BLOCK)
    if MODE == "error":
        flag = tl.where(i_class == K, top != label, (top == i_class) != (label == i_class))
        counted = counted & (broken == 0)
        v = tl.load(p_uncertainty + o * s_u_voxel, mask=m, other=0.0).to(tl.float32)
        broken = v != v
    elif MODE == "top":
        flag = top == label
    elif MODE == "class":
        flag = label == i_class
    else:
        flag = label != 0
    broken = broken & counted
    counted = counted & (broken == 0)
    return tl.where(counted, v, 0.0), flag, counted, broken


@triton.jit
def _place(p_value, p_uncertainty, p_label, rows, K, voxels, blocks, s_image, s_u_image, MODE: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """(pointers at this program's image, image, class, first and last voxel, where its results go)."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_chunk = i_program % rows, i_program // rows
    if MODE == "top":
        i_image, i_class = i_row, 0
    elif MODE == "error":
        i_image, i_class = i_row // (K + 1), (i_row % (K + 1)).to(tl.int32)
    else:
        i_image, i_class = i_row // K, (i_row % K).to(tl.int32)
    p_label += (i_row if MODE == "given" else i_image) * voxels
    start = i_chunk * blocks * BLOCK
    end = tl.minimum(start + tl.cast(blocks, tl.int64) * BLOCK, voxels)
    o_out = i_row * (tl.num_programs(0) // rows) + i_chunk
    return (
        p_value + i_image * s_image, p_uncertainty + i_image * s_u_image, p_label,
        i_image, i_class, start, end, o_out,
    )  # fmt: skip


_RUN_TIME = ["voxels", "K", "rows", "blocks", "span", "ignore_index", "num_bins", "first_bin"]


@triton.jit(do_not_specialize=_RUN_TIME)
def counts_kernel(
    p_value, p_uncertainty, p_label, p_mask, p_counts, p_undefined,
    voxels, K, rows, blocks, s_image, s_class, s_voxel, s_u_image, s_u_voxel, ignore_index,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fine histograms (magnitude bins of `class` and `top`) of `blocks` blocks of one row.

    p_counts: int32 (rows, programs, 2, 64, 64). p_undefined: int32 (rows, programs).
    """
    voxels = tl.cast(voxels, tl.int64)
    s_class, s_voxel, s_u_voxel = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64), tl.cast(s_u_voxel, tl.int64)
    p_value, p_uncertainty, p_label, i_image, i_class, start, end, o_out = _place(
        p_value, p_uncertainty, p_label, rows, K, voxels, blocks, s_image, s_u_image, MODE, BLOCK
    )
    o_row, o_column = tl.arange(0, 2 * _ROWS), tl.arange(0, _COLUMNS)
    counts = tl.zeros([2 * _ROWS, _COLUMNS], tl.int32)
    undefined = tl.zeros([BLOCK], tl.int32)
    for o_first in range(start, end, BLOCK):
        o = o_first + tl.arange(0, BLOCK)
        v, flag, counted, broken = _look(
            p_value, p_uncertainty, p_label, p_mask, o, o < end, i_image, i_class, K, voxels,
            s_class, s_voxel, s_u_voxel, ignore_index, MODE, HAS_MASK, BLOCK,
        )  # fmt: skip
        undefined += broken.to(tl.int32)
        b_bin = _magnitude_bin(v)
        if MODE == "error" or MODE == "given":
            b_bin += _thresholds_below(v)
        b_row = tl.where(counted, (b_bin >> _COLUMN_BITS) + tl.where(flag, _ROWS, 0), -1)
        b_left = (o_row[:, None] == b_row[None, :]).to(tl.int8)  # [128, BLOCK]
        b_right = ((b_bin & (_COLUMNS - 1))[:, None] == o_column[None, :]).to(tl.int8)  # [BLOCK, 64]
        counts = tl.dot(b_left, b_right, counts, out_dtype=tl.int32)
    p_counts += o_out * (2 * _ROWS * _COLUMNS)
    tl.store(p_counts + o_row[:, None] * _COLUMNS + o_column[None, :], counts)
    tl.store(p_undefined + o_out, tl.sum(undefined))


@triton.jit(do_not_specialize=_RUN_TIME)
def reliability_kernel(
    p_value, p_uncertainty, p_label, p_mask, p_sums,
    voxels, K, rows, blocks, span, s_image, s_class, s_voxel, ignore_index, num_bins, first_bin,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reliability bins first_bin ... first_bin + BINS - 1 of `blocks` blocks of a row of `class` or `top`.

    p_sums: float64 (rows, programs, 3 BINS + 3), sums of confidence, hits and voxels, then of squares (p - y)^2, of
    -ln p where hit, and of NaN. Lanes add `span` blocks in float32, and these in float64.
    """
    voxels = tl.cast(voxels, tl.int64)
    s_class, s_voxel, step = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64), tl.cast(span, tl.int64) * BLOCK
    p_value, p_uncertainty, p_label, i_image, i_class, start, end, o_out = _place(
        p_value, p_uncertainty, p_label, rows, K, voxels, blocks, s_image, 0, MODE, BLOCK
    )
    o_bin = tl.arange(0, BINS)
    scale = tl.cast(num_bins, tl.float64) * _INVERSE_RANGE
    confidence = tl.zeros([BINS], tl.float64)
    hits, number = confidence, confidence
    squares = tl.full((), 0.0, tl.float64)
    log_loss, undefined = squares, squares
    for o_span in range(start, end, step):
        b_confidence = tl.zeros([BLOCK, BINS], tl.float32)
        b_hits, b_number = b_confidence, b_confidence
        b_squares = tl.zeros([BLOCK], tl.float32)
        b_log_loss, b_undefined = b_squares, b_squares
        for o_first in range(o_span, tl.minimum(o_span + step, end), BLOCK):
            o = o_first + tl.arange(0, BLOCK)
            v, flag, counted, broken = _look(
                p_value, p_uncertainty, p_label, p_mask, o, o < end, i_image, i_class, K, voxels,
                s_class, s_voxel, 1, ignore_index, MODE, HAS_MASK, BLOCK,
            )  # fmt: skip
            b_undefined += broken.to(tl.float32)
            b_bin = (v.to(tl.float64) * scale).to(tl.int32)
            b_bin = tl.minimum(tl.maximum(b_bin, 0), num_bins - 1) - first_bin
            inside = (b_bin[:, None] == o_bin[None, :]) & counted[:, None]  # [BLOCK, BINS]
            b_confidence += tl.where(inside, v[:, None], 0.0)
            b_hits += tl.where(inside & flag[:, None], 1.0, 0.0)
            b_number += tl.where(inside, 1.0, 0.0)
            if MODE == "class":
                own = counted & flag
                gap = tl.where(own, v - 1.0, v)
                b_squares += gap * gap
                b_log_loss -= tl.where(own, tl.log(tl.where(own, v, 1.0)), 0.0)
        confidence += tl.sum(b_confidence.to(tl.float64), 0)
        hits += tl.sum(b_hits.to(tl.float64), 0)
        number += tl.sum(b_number.to(tl.float64), 0)
        squares += tl.sum(b_squares.to(tl.float64), 0)
        log_loss += tl.sum(b_log_loss.to(tl.float64), 0)
        undefined += tl.sum(b_undefined.to(tl.float64), 0)
    p_sums += o_out * (3 * BINS + 3)
    tl.store(p_sums + o_bin, confidence)
    tl.store(p_sums + BINS + o_bin, hits)
    tl.store(p_sums + 2 * BINS + o_bin, number)
    tl.store(p_sums + 3 * BINS, squares)
    tl.store(p_sums + 3 * BINS + 1, log_loss)
    tl.store(p_sums + 3 * BINS + 2, undefined)


class _Maps(NamedTuple):
    """What the kernels read: value (N, K, V), uncertainty (N, V), label (N, V), of `given` flags (N, K, V), mask."""

    value: Tensor
    uncertainty: Tensor
    label: Tensor
    mask: Tensor | None
    ignore_index: int = 0

    def split(self) -> tuple[int, int]:
        """(programs of a row, blocks of a program): of the shape alone."""
        blocks = cdiv(self.label.shape[-1], BLOCK)
        programs = max(min(PROGRAMS, cdiv(blocks, SPAN)), 1)
        return programs, cdiv(blocks, programs)

    def rows(self, mode: str) -> int:
        n, k, _ = self.value.shape
        return n * {CLASS: k, TOP: 1, ERROR: k + 1, GIVEN: k}[mode]

    def counts(self, mode: str, bins: int) -> tuple[Tensor, Tensor]:
        """Counts (rows, 2, bins) and NaN (rows,), int64."""
        rows, (programs, blocks) = self.rows(mode), self.split()
        counts = self.value.new_empty((rows, programs, 2, _ROWS.value * _COLUMNS.value), dtype=torch.int32)
        undefined = self.value.new_empty((rows, programs), dtype=torch.int32)
        with torch.cuda.device_of(self.value):
            counts_kernel[(rows * programs,)](
                *self.pointers(), counts, undefined, self.label.shape[-1], self.value.shape[1], rows, blocks,
                *self.value.stride(), *self.uncertainty.stride(), self.ignore_index,
                MODE=mode, HAS_MASK=self.mask is not None, BLOCK=BLOCK,
                num_warps=warps_on(COUNTS_WARPS, self.value.device),
            )  # fmt: skip
        return counts[..., :bins].sum(1, dtype=torch.int64), undefined.sum(1, dtype=torch.int64)

    def reliability(self, mode: str, num_bins: int) -> tuple[Tensor, Tensor]:
        """Float64 (rows, 3, num_bins), and squares, log loss and NaN (rows, 3)."""
        rows, (programs, blocks) = self.rows(mode), self.split()
        bins, parts = BINS_HELD, []
        for first in range(0, num_bins, bins):
            sums = self.value.new_empty((rows, programs, 3 * bins + 3), dtype=torch.float64)
            with torch.cuda.device_of(self.value):
                reliability_kernel[(rows * programs,)](
                    *self.pointers(), sums, self.label.shape[-1], self.value.shape[1], rows, blocks, SPAN,
                    *self.value.stride(), self.ignore_index, num_bins, first,
                    MODE=mode, HAS_MASK=self.mask is not None, BINS=bins, BLOCK=BLOCK,
                    num_warps=warps_on(RELIABILITY_WARPS, self.value.device),
                )  # fmt: skip
            parts.append(sums.sum(1))
        reliability = torch.cat([part[:, : 3 * bins].view(rows, 3, bins) for part in parts], 2)
        return reliability[..., :num_bins], parts[0][:, 3 * bins :]

    def pointers(self) -> tuple[Tensor, ...]:
        mask = self.label if self.mask is None else self.mask
        return self.value, self.uncertainty, self.label, mask


def _bytes(x: Tensor) -> Tensor:
    """Booleans as the kernels read them."""
    return x.contiguous().view(torch.uint8)


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.binary_histogram`."""
    n, c, _ = flag.shape
    mask = None if counted is None else _bytes(counted)
    counts, undefined = _Maps(value[:, None].expand(flag.shape), value, _bytes(flag), mask).counts(GIVEN, BINS)
    return counts.unflatten(0, (n, c)), undefined.view(n, c)[:, 0].contiguous()


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    parts: Parts,
) -> tuple[Tensor, ...]:
    """`reference.segmentation_histograms`."""
    n, k = probability.shape[:2]
    p = flat(probability)
    u = p[:, 0] if uncertainty is None else uncertainty.flatten(1)
    mask = None if mask is None else _bytes(mask.flatten(1))
    maps = _Maps(p, u, target.flatten(1).contiguous(), mask, ignore_index)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros((n, *shape), dtype=dtype, device=p.device)

    reliability, loss = (zeros(*shape, dtype=torch.float64) for shape in ((k + 1, 3, num_bins), (3, k)))
    confidence = zeros(k + 1, 2, 2 * HALF if parts.magnitudes else 0)
    errors, undefined = zeros(k + 1, 2, 0 if uncertainty is None else BINS), zeros(2)
    if parts.classes or parts.loss:
        bins, extra = maps.reliability(CLASS, num_bins)
        if parts.classes:
            reliability[:, :k] = bins.unflatten(0, (n, k))
        if parts.loss:
            loss[:, :2] = extra[:, :2].view(n, k, 2).mT
            loss[:, 2] = bins[:, 1].sum(-1).view(n, k)
    # The top label's sweep is the one that sees every probability of a voxel, NaN among them.
    bins, extra = maps.reliability(TOP, num_bins if parts.top else 1)
    undefined[:, 0] = extra[:, 2]
    if parts.top:
        reliability[:, k] = bins
    if parts.magnitudes and parts.classes:
        confidence[:, :k] = maps.counts(CLASS, 2 * HALF)[0].unflatten(0, (n, k))
    if parts.magnitudes and parts.top:
        confidence[:, k] = maps.counts(TOP, 2 * HALF)[0]
    if uncertainty is not None:
        counts, without = maps.counts(ERROR, BINS)
        errors.copy_(counts.unflatten(0, (n, k + 1)))
        undefined[:, 1] = without.view(n, k + 1)[:, -1]
    return reliability, confidence, errors, loss, undefined


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    common: dict[str, tuple[Any, ...]] = {
        "mask": (False, True),
        "dtype": ("float32", "bfloat16", "float16"),
        "labels": ("u8", "i8", "i16", "i32", "i64"),
        "contiguous": (True, False),
    }
    counted = common | {"mode": (CLASS, TOP, ERROR, GIVEN), "uncertainty": ("float32", "bfloat16", "float16")}
    binned = common | {"mode": (CLASS, TOP)}

    def arguments(kernel: Any, f: Flags) -> Arguments:
        types = {name: "int" for name in kernel.arg_names if name.startswith("s_")}
        types |= dict.fromkeys(_RUN_TIME, "i32") | {"voxels": "int", "ignore_index": "int"}
        types |= {
            "p_value": pointer_type(f["dtype"]),
            "p_uncertainty": pointer_type(f["uncertainty" if "uncertainty" in f else "dtype"]),
        }
        types |= {"p_label": f"*{f['labels']}", "p_mask": "*u8", "p_counts": "*i32", "p_undefined": "*i32"}
        types |= {"p_sums": "*fp64"}
        constants = {"MODE": f["mode"], "HAS_MASK": f["mask"], "BLOCK": BLOCK}
        if kernel is reliability_kernel:
            constants["BINS"] = BINS_HELD
        if f["contiguous"]:
            constants |= {name: 1 for name in ("s_voxel", "s_u_voxel") if name in kernel.arg_names}
        return Arguments(types, constants, COUNTS_WARPS if kernel is counts_kernel else RELIABILITY_WARPS)

    return [
        KernelCases(
            kernel,
            "segmentation_histograms",
            "forward",
            flags,
            functools.partial(arguments, kernel),
            lambda f: f["mode"] != GIVEN or f["labels"] == "u8",
        )
        for kernel, flags in ((counts_kernel, counted), (reliability_kernel, binned))
    ]
