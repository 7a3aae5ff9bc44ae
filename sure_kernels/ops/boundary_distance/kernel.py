"""Boundary distance and band on the GPU: boundary voxels, then one min-plus pass along each axis.

A voxel is boundary where the largest and the smallest label of its 3^ndim neighbourhood differ; `_boundary_kernel`
marches along z and keeps both, over the 3 x 3 neighbourhood in a plane, of two planes in registers: 9 loads a voxel.
With codes c of squared distance (`codes.py`: 0 on the boundary, `none` elsewhere) the distance along w then takes two
scans of a row (`_scan_kernel`), and the other axes one pass each (`_min_plus_kernel`),

    c[i] <- min over |k| <= R of c[i + k] + cost k^2,  R: the steps within reach,

the last of which writes the distance, +inf beyond the limit, or the band. Where R exceeds _UNCHECKED a program looks
every so many steps whether anything in its block can still shrink, so that the full distance takes as many steps as
the distances found, not as the axis is long. Nothing is read back to the host.

Bytes a voxel for uint8 labels in 3D and max_distance 4 (codes of a byte): boundary, w and h read and write one each, d
reads one and writes 4, or 1 of the band: 11, or 8, in four launches. One pass could do with 5, or 2, but its tiles
would overlap by 5 voxels on each side, and Triton cannot share what a tile holds between threads. Held meanwhile: one
byte a voxel, two while a pass runs. Longer reach takes codes of 2 bytes; float32 where the spacing is no whole multiple
of a unit, or more than 64 steps are in reach.

Instructions a voxel on sm_90: 103 boundary, 82 w, 57 h and 79 d with R = 4 (9 for each step more): 321, so that not the
bytes bind but the issue of instructions: 1.8 ms for 512^3 on an H200 by the assumptions of the other kernels' estimates
(0.4 ms for the bytes). Full distances take 17 a step and pass, 19 ms there where they average 100 voxels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases
from sure_kernels.kernel_lib.device_taps import march_program, plane_position
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR, NEAR, comparable
from sure_kernels.kernel_lib.launch import Launch, cdiv, march_grid, march_length, planned, warps_on
from sure_kernels.ops.boundary_distance.codes import Codes, choose_codes

BLOCK_BOUNDARY, BLOCK_ROWS = 256, 512
NUM_WARPS = 4
# Voxels of a row that one program handles: the largest of those that leave the fewest lanes idle.
_ROW_BLOCKS = (1024, 512, 256, 128)
# Voxels of a program of the first pass, and the longest rows it takes.
_SCAN_TILE, _LONGEST_SCAN = 2048, 2048
# Steps between two looks at whether anything can still shrink; a window that short is not looked at.
_UNCHECKED = 8
UNCHECKED = tl.constexpr(_UNCHECKED)
# Farther than any row is long.
FAR_AWAY = tl.constexpr(1 << 28)
_NEAR, _BOUNDARY, _FAR = tl.constexpr(NEAR), tl.constexpr(BOUNDARY), tl.constexpr(FAR)


@triton.jit
def _load_label(p_label, m, ignored, WIDE: tl.constexpr, SIGNED: tl.constexpr, USE_IGNORED: tl.constexpr):
    """Label (int32, int64 where WIDE), those below 1 alike, and whether it counts: two [BLOCK]."""
    b_raw = tl.load(p_label, mask=m, other=0)
    b_label = b_raw.to(tl.int64) if WIDE else b_raw.to(tl.int32)
    counted = m
    if USE_IGNORED:
        counted = m & (b_label != ignored)
    if SIGNED:
        b_label = tl.maximum(b_label, 0)
    return b_label, counted


@triton.jit
def _plane_extremes(
    p_image, z, o_h, o_w, m, D, H, W, s_d, s_h, s_w, ignored,
    WIDE: tl.constexpr, SIGNED: tl.constexpr, USE_IGNORED: tl.constexpr,
):  # fmt: skip
    """Smallest and largest label that counts among 3 x 3 voxels of plane z, and whether the middle one does."""
    s_d, s_h, s_w = tl.cast(s_d, tl.int64), tl.cast(s_h, tl.int64), tl.cast(s_w, tl.int64)
    p_plane = p_image + z * s_d
    m = m & (z >= 0) & (z < D)
    p_middle = p_plane + o_h * s_h + o_w * s_w
    b_label, middle = _load_label(p_middle, m, ignored, WIDE, SIGNED, USE_IGNORED)
    # What a neighbour that does not count stands for, on either side.
    HIGHEST: tl.constexpr = 2**63 - 1 if WIDE else 2**31 - 1
    b_low = tl.where(middle, b_label, HIGHEST)
    b_high = tl.where(middle, b_label, -HIGHEST - 1)
    for i in tl.static_range(9):
        if i != 4:
            o_row, o_column = o_h + (i // 3 - 1), o_w + (i % 3 - 1)
            m_there = m & (o_row >= 0) & (o_row < H) & (o_column >= 0) & (o_column < W)
            p_there = p_plane + o_row * s_h + o_column * s_w
            b_label, counted = _load_label(p_there, m_there, ignored, WIDE, SIGNED, USE_IGNORED)
            b_low = tl.minimum(b_low, tl.where(counted, b_label, HIGHEST))
            b_high = tl.maximum(b_high, tl.where(counted, b_label, -HIGHEST - 1))
    return b_low, b_high, middle


@triton.jit(do_not_specialize=["D", "H", "STEPS", "ignored", "none"])
def _boundary_kernel(
    p_label, p_out, D, H, W, STEPS, s_n, s_d, s_h, s_w, ignored, none,
    DIMS: tl.constexpr, WIDE: tl.constexpr, SIGNED: tl.constexpr, USE_IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """0 on the boundary and `none` elsewhere, into a contiguous (N, D, H, W); int32 arithmetic unless WIDE."""
    i_n, z_first, start = march_program(D, H, W, STEPS, BLOCK)
    o_h, o_w = plane_position(start, W, BLOCK)
    m = o_h < H  # [BLOCK]
    plane = tl.cast(H, tl.int64) * W
    p_image = p_label + i_n * s_n
    p_out += i_n * D * plane + start + tl.arange(0, BLOCK)
    low1, high1, middle = _plane_extremes(
        p_image, z_first, o_h, o_w, m, D, H, W, s_d, s_h, s_w, ignored, WIDE, SIGNED, USE_IGNORED
    )
    if DIMS == 2:
        b_code = tl.where((high1 > low1) & middle, 0, none)
        tl.store(p_out, b_code.to(p_out.dtype.element_ty), mask=m)
    else:
        low0, high0, _ = _plane_extremes(
            p_image, z_first - 1, o_h, o_w, m, D, H, W, s_d, s_h, s_w, ignored, WIDE, SIGNED, USE_IGNORED
        )
        for z in range(z_first, tl.minimum(z_first + STEPS, D)):
            low2, high2, next_middle = _plane_extremes(
                p_image, z + 1, o_h, o_w, m, D, H, W, s_d, s_h, s_w, ignored, WIDE, SIGNED, USE_IGNORED
            )
            b_low = tl.minimum(tl.minimum(low0, low1), low2)
            b_high = tl.maximum(tl.maximum(high0, high1), high2)
            b_code = tl.where((b_high > b_low) & middle, 0, none)
            tl.store(p_out + z * plane, b_code.to(p_out.dtype.element_ty), mask=m)
            low0, high0 = low1, high1
            low1, high1, middle = low2, high2, next_middle


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["rows", "R", "cost", "none"])
def _scan_kernel(
    p_codes, rows, W, R, cost, none, FLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The first pass, in place, along whole rows of length W <= COLUMNS: the nearest 0 before and after."""
    i_program = tl.program_id(0).to(tl.int64)
    o_row, o_column = i_program * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m = (o_row < rows)[:, None] & (o_column < W)[None, :]  # [ROWS, COLUMNS]
    p_codes += o_row[:, None] * W + o_column[None, :]
    b_boundary = (tl.load(p_codes, mask=m, other=none) == 0) & m
    b_column = o_column[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32)
    b_last = tl.associative_scan(tl.where(b_boundary, b_column, -FAR_AWAY), 1, _larger)
    b_next = tl.associative_scan(tl.where(b_boundary, b_column, FAR_AWAY), 1, _smaller, reverse=True)
    b_steps = tl.minimum(b_column - b_last, b_next - b_column)
    b_counted = b_steps <= R
    b_steps = tl.where(b_counted, b_steps, 0)
    if FLOAT:
        b_steps = b_steps.to(tl.float32)
    b_code = tl.where(b_counted, cost * b_steps * b_steps, none)
    tl.store(p_codes, b_code.to(p_codes.dtype.element_ty), mask=m)


@triton.jit
def _shrink(p_in, b_best, o_axis, m, first, last, L, S, cost, none, FLOAT: tl.constexpr):
    """Minimum of `b_best` and what lies `first` to `last` steps off on either side, plus its cost."""
    for step in range(first, last + 1):
        p_before, p_after = p_in - step * S, p_in + step * S
        b_before = tl.load(p_before, mask=m & (o_axis >= step), other=none)
        b_after = tl.load(p_after, mask=m & (o_axis + step < L), other=none)
        b_least = tl.minimum(b_before, b_after)
        if FLOAT:
            distance = tl.cast(step, tl.float32)
            b_best = tl.minimum(b_best, b_least + cost * distance * distance)
        else:
            b_best = tl.minimum(b_best, b_least.to(tl.int32) + cost * step * step)
    return b_best


@triton.jit(do_not_specialize=["L", "R", "cost", "none", "limit", "boundary", "near"])
def _min_plus_kernel(
    p_in, p_out, total, L, S, R, cost, none, limit, boundary, near, unit,
    TILE: tl.constexpr, FINISH: tl.constexpr, FLOAT: tl.constexpr, CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass along the axis of length L and stride S of `total` contiguous codes.

    TILE: `row` where the BLOCK voxels are at the same place of the axis, which lets a thread load several at once;
    `rows` where they are not; `last` where S = 1. FINISH: `codes`, `distance` or `band`, what is written. CHECKED: R
    exceeds UNCHECKED. `unit` is of distance.
    """
    i_program = tl.program_id(0)
    if TILE == "row":
        tiles = tl.cdiv(S, BLOCK).to(tl.int32)
        i_row, i_tile = i_program // tiles, i_program % tiles
        o_axis = i_row % L
        m = i_tile * BLOCK + tl.arange(0, BLOCK) < S  # [BLOCK]
        start = i_row.to(tl.int64) * S + i_tile.to(tl.int64) * BLOCK
    else:
        start = i_program.to(tl.int64) * BLOCK
        m = start + tl.arange(0, BLOCK) < total
        if TILE == "last":
            o_axis = (i_program % L * BLOCK + tl.arange(0, BLOCK)) % L
        else:
            o_row, _ = plane_position(start, S, BLOCK)
            o_axis = o_row % L
    S = tl.cast(S, tl.int64)
    p_in += start + tl.arange(0, BLOCK)
    p_out += start + tl.arange(0, BLOCK)
    b_best = tl.load(p_in, mask=m, other=0)
    if not FLOAT:
        b_best = b_best.to(tl.int32)
    if CHECKED:
        first = 1
        shrinks = tl.max(b_best, 0) > 0
        while shrinks:
            last = tl.minimum(first + (UNCHECKED - 1), R)
            b_best = _shrink(p_in, b_best, o_axis, m, first, last, L, S, cost, none, FLOAT)
            first = last + 1
            reached = cost * tl.cast(first, tl.float32) * tl.cast(first, tl.float32)
            shrinks = (first <= R) & (tl.max(b_best, 0) > reached)
    else:
        b_best = _shrink(p_in, b_best, o_axis, m, 1, R, L, S, cost, none, FLOAT)
    if FINISH == "codes":
        tl.store(p_out, b_best.to(p_out.dtype.element_ty), mask=m)
    elif FINISH == "distance":
        b_distance = tl.sqrt_rn(b_best.to(tl.float32)) * unit
        tl.store(p_out, tl.where(b_best <= limit, b_distance, float("inf")), mask=m)
    else:
        b_band = tl.where(b_best <= near, _NEAR, 0)
        b_band = tl.where(b_best <= boundary, _BOUNDARY, b_band)
        tl.store(p_out, tl.where(b_best > limit, _FAR, b_band).to(tl.uint8), mask=m)


@planned
def _boundary_launch(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    codes: Codes,
    ignored: int | None,
    wide: bool,
    signed: bool,
    dims: int,
    device: torch.device,
) -> Launch:
    """From labels of this shape (N, D, H, W)."""
    n, *sizes = shape
    steps = march_length(math.prod(shape), sizes[0])
    numbers = (*sizes, steps, *strides, 0 if ignored is None else ignored, codes.none)
    options = {
        "DIMS": dims,
        "WIDE": wide,
        "SIGNED": signed,
        "USE_IGNORED": ignored is not None,
        "BLOCK": BLOCK_BOUNDARY,
        "num_warps": warps_on(NUM_WARPS, device),
    }
    return Launch(_boundary_kernel, march_grid(n, sizes, steps, BLOCK_BOUNDARY), numbers, options)


def _boundary(target: Tensor, codes: Codes, ignore_index: int) -> Tensor:
    """Contiguous codes (N, *spatial): 0 on the boundary, `none` elsewhere."""
    labels, ignored = comparable(target, ignore_index)
    out = torch.empty(target.shape, dtype=codes.dtype, device=target.device)
    x = labels.unsqueeze(1) if target.ndim == 3 else labels
    kind = (labels.dtype == torch.int64, target.dtype.is_signed, target.ndim - 1)
    _boundary_launch(x.shape, x.stride(), codes, ignored, *kind, x.device)(x, out)
    return out


def _tile(axis_stride: int) -> tuple[str, int, int]:
    """TILE, BLOCK and warps of a pass along an axis of this stride."""
    if axis_stride < min(_ROW_BLOCKS):
        return ("last" if axis_stride == 1 else "rows"), BLOCK_ROWS, NUM_WARPS
    block = min(_ROW_BLOCKS, key=lambda b: cdiv(axis_stride, b) * b)
    return "row", block, max(1, block // 256)


@planned
def _min_plus(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    axis: int,
    codes: Codes,
    finish: str,
    thresholds: tuple[float, float],
    device: torch.device,
) -> Launch:
    """The pass of codes (N, *spatial) along `axis`; `thresholds` (boundary, near) of a band."""
    length, stride, steps, total = shape[axis], strides[axis], codes.steps[axis - 1], math.prod(shape)
    tile, block, warps = _tile(stride)
    programs = total // stride * cdiv(stride, block) if tile == "row" else cdiv(total, block)
    numbers = (
        total, length, stride, steps,
        codes.costs[axis - 1], codes.none, codes.limit, *thresholds, math.sqrt(codes.unit),
    )  # fmt: skip
    options = {
        "TILE": tile,
        "FINISH": finish,
        "FLOAT": codes.dtype == torch.float32,
        "CHECKED": steps > _UNCHECKED,
        "BLOCK": block,
        "num_warps": warps_on(warps, device),
    }
    return Launch(_min_plus_kernel, (programs,), numbers, options)


@planned
def _scan(shape: tuple[int, ...], codes: Codes, device: torch.device) -> Launch:
    """The first pass, along the last axis of codes (N, *spatial), in place."""
    width = shape[-1]
    columns = triton.next_power_of_2(width)
    rows = math.prod(shape) // width
    tall = min(_SCAN_TILE // columns, triton.next_power_of_2(rows))
    numbers = (rows, width, codes.steps[-1], codes.costs[-1], codes.none)
    options = {
        "FLOAT": codes.dtype == torch.float32,
        "ROWS": tall,
        "COLUMNS": columns,
        "num_warps": warps_on(NUM_WARPS, device),
    }
    return Launch(_scan_kernel, (cdiv(rows, tall),), numbers, options)


def _transform(
    target: Tensor,
    codes: Codes,
    ignore_index: int,
    dtype: torch.dtype,
    finish: str,
    thresholds: tuple[float, float] | None = None,
) -> Tensor:
    """(N, 1, *spatial) of `dtype`: the distance or, with `thresholds`, the band."""
    n, *spatial = target.shape
    out = torch.empty((n, 1, *spatial), dtype=dtype, device=target.device)
    thresholds = thresholds or (codes.limit, codes.limit)
    with torch.cuda.device_of(target):
        held = _boundary(target, codes, ignore_index)
        inner = range(target.ndim - 1, 1, -1)
        if target.shape[-1] <= _LONGEST_SCAN:
            _scan(held.shape, codes, held.device)(held)
            inner = inner[1:]
        for axis in inner:
            passed = torch.empty_like(held)
            _min_plus(held.shape, held.stride(), axis, codes, "codes", thresholds, held.device)(held, passed)
            held = passed
        _min_plus(held.shape, held.stride(), 1, codes, finish, thresholds, held.device)(held, out)
    return out


def boundary_distance(
    target: Tensor, *, max_distance: float | None, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Float32 (N, 1, *spatial); +inf without a boundary or beyond `max_distance`."""
    codes = choose_codes(tuple(target.shape[1:]), spacing, max_distance)
    return _transform(target, codes, ignore_index, torch.float32, "distance")


def boundary_band(
    target: Tensor, *, boundary: float, near: float, far: float, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """uint8 (N, 1, *spatial), straight from the codes."""
    codes = choose_codes(tuple(target.shape[1:]), spacing, far)
    thresholds = (codes.of(boundary), codes.of(near))
    return _transform(target, codes, ignore_index, torch.uint8, "band", thresholds)


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    integers = {"uint8": "u8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64"}
    codes = {"uint8": "u8", "int16": "i16", "float32": "fp32"}

    def boundary(f: Flags) -> Arguments:
        types = dict.fromkeys(("D", "H", "W", "STEPS"), "i32")
        types |= dict.fromkeys(("s_n", "s_d", "s_h", "s_w", "ignored"), "int")
        types |= {"p_label": f"*{integers[f['labels']]}", "p_out": f"*{codes[f['codes']]}"}
        types["none"] = "fp32" if f["codes"] == "float32" else "i32"
        constants: dict[str, Any] = {
            "DIMS": f["dims"],
            "WIDE": f["labels"] == "int64",
            "SIGNED": f["signed"],
            "USE_IGNORED": f["ignored"],
            "BLOCK": BLOCK_BOUNDARY,
        }
        if f["contiguous"]:
            constants["s_w"] = 1
        return Arguments(types, constants, NUM_WARPS)

    def number(f: Flags) -> str:
        return "fp32" if f["codes"] == "float32" else "i32"

    def scan(f: Flags) -> Arguments:
        types = {"p_codes": f"*{codes[f['codes']]}", "rows": "int", "W": "i32", "R": "i32"}
        types |= dict.fromkeys(("cost", "none"), number(f))
        tall = 1 if f["one_row"] else _SCAN_TILE // f["columns"]
        constants = {"FLOAT": f["codes"] == "float32", "ROWS": tall, "COLUMNS": f["columns"]}
        return Arguments(types, constants | ({"W": 1} if f["columns"] == 1 else {}), NUM_WARPS)

    def min_plus(f: Flags) -> Arguments:
        types = dict.fromkeys(("cost", "none", "limit", "boundary", "near"), number(f))
        types |= {"total": "int", "L": "i32", "S": "i32", "R": "i32", "unit": "fp32"}
        types["p_in"] = f"*{codes[f['codes']]}"
        types["p_out"] = {"codes": types["p_in"], "distance": "*fp32", "band": "*u8"}[f["finish"]]
        tile, block, warps = _tile(f["stride"])
        constants: dict[str, Any] = {
            "TILE": tile,
            "FINISH": f["finish"],
            "FLOAT": f["codes"] == "float32",
            "CHECKED": f["checked"],
            "BLOCK": block,
        }
        return Arguments(types, constants | ({"S": 1} if tile == "last" else {}), warps)

    boundary_flags: dict[str, tuple[Any, ...]] = {
        "dims": (2, 3),
        "labels": tuple(integers),
        "signed": (True, False),
        "codes": tuple(codes),
        "ignored": (True, False),
        "contiguous": (True, False),
    }
    scan_flags: dict[str, tuple[Any, ...]] = {
        "columns": tuple(1 << i for i in range(_LONGEST_SCAN.bit_length())),
        "one_row": (True, False),
        "codes": tuple(codes),
    }
    min_plus_flags: dict[str, tuple[Any, ...]] = {
        "stride": (1, 2, *_ROW_BLOCKS),
        "codes": tuple(codes),
        "finish": ("codes", "distance", "band"),
        "checked": (True, False),
    }
    return [
        KernelCases(
            _boundary_kernel, "boundary_distance", "forward", boundary_flags, boundary,
            # Bytes are what they say; wider labels are seen as signed, whichever they were.
            lambda f: f["labels"] not in ("uint8", "int8") or f["signed"] == (f["labels"] == "int8"),
        ),
        KernelCases(_scan_kernel, "boundary_distance", "forward", scan_flags, scan),
        KernelCases(
            _min_plus_kernel, "boundary_distance", "forward", min_plus_flags, min_plus,
            lambda f: f["stride"] == 1 or f["integers"] != "1",
        ),
    ]  # fmt: skip
