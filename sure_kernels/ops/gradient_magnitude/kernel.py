"""Gradient magnitude on the GPU, forward and backward, marching along z.

With D_d the derivative along axis d (3-tap filters, see `kernel_lib/device_taps.py`) of one channel of the image,

    q_c = sum_d D_d^2,  r = sum_c q_c | max_c q_c | (mean_c sqrt q_c)^2,  g = sqrt(r + eps^2)

Forward, one program: BLOCK voxels of a plane, STEPS planes. One channel keeps the parts of two planes in registers:
9 loads a voxel, 4 bytes written. More channels read three planes for each voxel and channel (27 loads, from cache).

Backward, up = dL/dg, w_c = dL/d(D_d) / D_d:

    w_c = up / g  |  up / g for the first largest channel, else 0  |  up sqrt(r) / (M g sqrt q_c)    (0/0 = 0)
    dL/d(image) = sum_d transpose(D_d) (w_c D_d)

The transpose is a gather, so there is nothing to add atomically and the result is the same bits every time. It runs
in two kernels: `_sweep_kernel` writes w_c D_d, `_adjoint_kernel` gathers. For a voxel and channel of a 3D
float32 image that is 8 bytes read and 12 written, then 12 read and 4 written, with 9 and 27 loads. One kernel would
have to form the components of 27 neighbours from 5 x 5 x 5 voxels of the image: marching, 25 loads and nine times the
arithmetic to save 24 bytes. The scratch is 12 bytes a voxel and channel (8 in 2D), freed on return.

Instructions a voxel in the marching loops, 3D Sobel, bfloat16, replicate (extrapolate), sm_90: 82 (113) forward,
107 (141) and 179 (200) backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib.device_taps import (
    adjoint_weights,
    first_planes,
    march,
    march_program,
    plane_parts,
    plane_position,
    voxel_gradient,
)
from sure_kernels.kernel_lib.launch import (
    Launch,
    as_volume,
    axis_scales,
    centre_tap,
    march_grid,
    march_length,
    planned,
    warps_on,
)
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES

# Voxels of a plane that one program handles: two a thread where registers allow it.
BLOCK_ONE_CHANNEL, BLOCK_CHANNELS, BLOCK_ADJOINT = 256, 128, 128
NUM_WARPS = 4


@triton.jit
def _reduced(
    p_image, z, o_h, o_w, M, D, H, W, s_c, s_d, s_h, s_w, scale_d, scale_h, scale_w,
    DIMS: tl.constexpr, CHANNELS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """r of plane z, and the first channel with the largest q: [BLOCK] each."""
    b_reduced = tl.zeros(o_h.shape, tl.float32)
    b_largest = tl.zeros(o_h.shape, tl.int32)
    for c in range(M):
        b_d, b_h, b_w = voxel_gradient(
            p_image + tl.cast(c, tl.int64) * s_c, z, o_h, o_w, D, H, W, s_d, s_h, s_w,
            scale_d, scale_h, scale_w, DIMS, CENTRE, PADDING,
        )  # fmt: skip
        b_square = b_d * b_d + b_h * b_h + b_w * b_w
        if CHANNELS == "max":
            b_largest = tl.where(b_square > b_reduced, c, b_largest)
            b_reduced = tl.maximum(b_reduced, b_square, propagate_nan=tl.PropagateNan.ALL)
        elif CHANNELS == "mean":
            b_reduced += tl.sqrt(b_square)
        else:
            b_reduced += b_square
    if CHANNELS == "mean":
        b_mean = b_reduced / tl.cast(M, tl.float32)
        b_reduced = b_mean * b_mean
    return b_reduced, b_largest


@triton.jit
def _weight(b_up, b_reduced, eps_squared):
    """up / g, and 0 where the image is flat."""
    b_g = tl.sqrt(b_reduced + eps_squared)
    return tl.where(b_g > 0, b_up / tl.where(b_g > 0, b_g, 1.0), 0.0)


@triton.jit
def _store_components(p_out, volume, b_weight, b_d, b_h, b_w, m, DIMS: tl.constexpr):
    """Weighted components in the order w, h, d, `volume` elements apart."""
    tl.store(p_out, b_weight * b_w, mask=m)
    tl.store(p_out + volume, b_weight * b_h, mask=m)
    if DIMS == 3:
        tl.store(p_out + 2 * volume, b_weight * b_d, mask=m)


@triton.jit
def _sweep_kernel(
    p_image, p_grad, p_out, M, D, H, W, STEPS,
    s_n, s_c, s_d, s_h, s_w, s_grad_n, s_grad_d, s_grad_h, s_grad_w,
    scale_d, scale_h, scale_w, eps,
    BACKWARD: tl.constexpr, DIMS: tl.constexpr, CHANNELS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """g into a contiguous (N, D, H, W), or for BACKWARD w_c D_d into a contiguous (N, M, DIMS, D, H, W).

    CHANNELS: `one`, or how several are reduced. Forward does not read `p_grad`.
    """
    i_n, z_first, start = march_program(D, H, W, STEPS, BLOCK)
    o_h, o_w = plane_position(start, W, BLOCK)
    m = o_h < H  # [BLOCK]
    z_end = tl.minimum(z_first + STEPS, D)
    plane = tl.cast(H, tl.int64) * W
    volume = D * plane
    eps_squared = tl.cast(eps, tl.float32) * eps
    p_image += i_n * s_n
    if BACKWARD:
        p_grad += i_n * s_grad_n + o_h * tl.cast(s_grad_h, tl.int64) + o_w * tl.cast(s_grad_w, tl.int64)
        p_out += i_n * M * DIMS * volume
    else:
        p_out += i_n * volume
    p_out += start + tl.arange(0, BLOCK)
    if CHANNELS == "one" and DIMS == 3:
        planes = first_planes(p_image, z_first, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
        for z in range(z_first, z_end):
            after = plane_parts(p_image, z + 1, o_h, o_w, D, H, W, s_d, s_h, s_w, CENTRE, PADDING)
            gradient, planes = march(planes, after, z, D, scale_d, scale_h, scale_w, CENTRE, PADDING)
            b_d, b_h, b_w = gradient
            b_square = b_d * b_d + b_h * b_h + b_w * b_w
            if BACKWARD:
                b_up = tl.load(p_grad + z * tl.cast(s_grad_d, tl.int64), mask=m, other=0.0).to(tl.float32)
                b_weight = _weight(b_up, b_square, eps_squared)
                _store_components(p_out + z * plane, volume, b_weight, b_d, b_h, b_w, m, DIMS)
            else:
                tl.store(p_out + z * plane, tl.sqrt(b_square + eps_squared), mask=m)
    else:
        for z in range(z_first, z_end):
            b_reduced, b_largest = _reduced(
                p_image, z, o_h, o_w, M, D, H, W, s_c, s_d, s_h, s_w, scale_d, scale_h, scale_w,
                DIMS, CHANNELS, CENTRE, PADDING,
            )  # fmt: skip
            if BACKWARD:
                b_up = tl.load(p_grad + z * tl.cast(s_grad_d, tl.int64), mask=m, other=0.0).to(tl.float32)
                b_weight = _weight(b_up, b_reduced, eps_squared)
                for c in range(M):
                    i_c = tl.cast(c, tl.int64)
                    b_d, b_h, b_w = voxel_gradient(
                        p_image + i_c * s_c, z, o_h, o_w, D, H, W, s_d, s_h, s_w,
                        scale_d, scale_h, scale_w, DIMS, CENTRE, PADDING,
                    )  # fmt: skip
                    b_share = b_weight
                    if CHANNELS == "max":
                        b_share = tl.where(b_largest == c, b_weight, 0.0)
                    elif CHANNELS == "mean":
                        b_share = b_weight * tl.sqrt(b_reduced) / tl.cast(M, tl.float32)
                        b_share = _weight(b_share, b_d * b_d + b_h * b_h + b_w * b_w, 0.0)
                    p_channel = p_out + i_c * DIMS * volume + z * plane
                    _store_components(p_channel, volume, b_share, b_d, b_h, b_w, m, DIMS)
            else:
                tl.store(p_out + z * plane, tl.sqrt(b_reduced + eps_squared), mask=m)


@triton.jit
def _gather_row(p_row, m, m_left, m_right, left, here, right, COLUMNS: tl.constexpr):
    """Weighted sum of three voxels of a row, or of the middle one alone."""
    b_sum = tl.load(p_row, mask=m, other=0.0)
    if COLUMNS:
        b_left = tl.load(p_row - 1, mask=m_left & m, other=0.0)
        b_right = tl.load(p_row + 1, mask=m_right & m, other=0.0)
        b_sum = b_left * left + b_sum * here + b_right * right
    return b_sum


@triton.jit
def _gather_plane(
    p_plane, m, m_above, m_below, m_left, m_right, W, above, middle, below, left, here, right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weighted sum over the neighbours in a contiguous plane of rows W long: up to 3 x 3."""
    b_sum = _gather_row(p_plane, m, m_left, m_right, left, here, right, COLUMNS)
    if ROWS:
        b_above = _gather_row(p_plane - W, m & m_above, m_left, m_right, left, here, right, COLUMNS)
        b_below = _gather_row(p_plane + W, m & m_below, m_left, m_right, left, here, right, COLUMNS)
        b_sum = b_above * above + b_sum * middle + b_below * below
    return b_sum


@triton.jit
def _gather_components(
    p_in, volume, o_h, o_w, m, H, W, scale_h, scale_w,
    DIMS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Transposed filters within a plane: (from the components w and h, from the component d)."""
    SMOOTH: tl.constexpr = CENTRE > 0
    above, middle, below = adjoint_weights(o_h, H, -1.0, 0.0, 1.0, PADDING)
    left, here, right = adjoint_weights(o_w, W, -1.0, 0.0, 1.0, PADDING)
    s_above, s_middle, s_below = adjoint_weights(o_h, H, 1.0, CENTRE, 1.0, PADDING)
    s_left, s_here, s_right = adjoint_weights(o_w, W, 1.0, CENTRE, 1.0, PADDING)
    m_above, m_below, m_left, m_right = o_h > 0, o_h < H - 1, o_w > 0, o_w < W - 1
    b_inner = scale_w * _gather_plane(
        p_in, m, m_above, m_below, m_left, m_right, W,
        s_above, s_middle, s_below, left, here, right, SMOOTH, True,
    )  # fmt: skip
    b_inner += scale_h * _gather_plane(
        p_in + volume, m, m_above, m_below, m_left, m_right, W,
        above, middle, below, s_left, s_here, s_right, True, SMOOTH,
    )  # fmt: skip
    b_across = tl.zeros_like(b_inner)
    if DIMS == 3:
        b_across = _gather_plane(
            p_in + 2 * volume, m, m_above, m_below, m_left, m_right, W,
            s_above, s_middle, s_below, s_left, s_here, s_right, SMOOTH, SMOOTH,
        )  # fmt: skip
    return b_inner, b_across


@triton.jit
def _adjoint_kernel(
    p_in, p_out, D, H, W, STEPS, scale_d, scale_h, scale_w,
    DIMS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_d transpose(D_d) y_d from contiguous components (N M, DIMS, D, H, W) into contiguous (N M, D, H, W)."""
    i_n, z_first, start = march_program(D, H, W, STEPS, BLOCK)
    o_h, o_w = plane_position(start, W, BLOCK)
    m = o_h < H  # [BLOCK]
    z_end = tl.minimum(z_first + STEPS, D)
    plane = tl.cast(H, tl.int64) * W
    volume = D * plane
    p_in += i_n * DIMS * volume + start + tl.arange(0, BLOCK)
    p_out += i_n * volume + start + tl.arange(0, BLOCK)
    if DIMS == 2:
        b_inner, _ = _gather_components(p_in, volume, o_h, o_w, m, H, W, scale_h, scale_w, DIMS, CENTRE, PADDING)
        tl.store(p_out, b_inner.to(p_out.dtype.element_ty), mask=m)
    else:
        # Planes before, at and after z.
        inner0, across0 = _gather_components(
            p_in + (z_first - 1) * plane, volume, o_h, o_w, m & (z_first > 0), H, W, scale_h, scale_w,
            DIMS, CENTRE, PADDING,
        )  # fmt: skip
        inner1, across1 = _gather_components(
            p_in + z_first * plane, volume, o_h, o_w, m, H, W, scale_h, scale_w, DIMS, CENTRE, PADDING
        )
        for z in range(z_first, z_end):
            inner2, across2 = _gather_components(
                p_in + (z + 1) * plane, volume, o_h, o_w, m & (z < D - 1), H, W, scale_h, scale_w,
                DIMS, CENTRE, PADDING,
            )  # fmt: skip
            before, here, after = adjoint_weights(z, D, -1.0, 0.0, 1.0, PADDING)
            b_result = scale_d * (before * across0 + here * across1 + after * across2)
            if CENTRE > 0:
                before, here, after = adjoint_weights(z, D, 1.0, CENTRE, 1.0, PADDING)
                b_result += before * inner0 + here * inner1 + after * inner2
            else:
                b_result += inner1
            tl.store(p_out + z * plane, b_result.to(p_out.dtype.element_ty), mask=m)
            inner0, across0 = inner1, across1
            inner1, across1 = inner2, across2


@planned
def _sweep(
    backward: bool,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    operator: str,
    spacing: tuple[float, ...],
    mode: str,
    reduction: str,
    eps: float,
    device: torch.device,
) -> Launch:
    """From a volume of this shape (N, M, D, H, W); `strides` are those of the volume and, but for M, of `grad`."""
    n, channels, *sizes = shape
    steps = march_length(n * math.prod(sizes), sizes[0])
    block = BLOCK_ONE_CHANNEL if channels == 1 else BLOCK_CHANNELS
    options = {
        "BACKWARD": backward,
        "DIMS": len(spacing),
        "CHANNELS": reduction if channels > 1 else "one",
        "CENTRE": centre_tap(operator),
        "PADDING": mode,
        "BLOCK": block,
        "num_warps": warps_on(NUM_WARPS, device),
    }
    numbers = (channels, *sizes, steps, *strides, *axis_scales(operator, spacing), eps)
    return Launch(_sweep_kernel, march_grid(n, sizes, steps, block), numbers, options)


@planned
def _adjoint(
    volumes: int, shape: tuple[int, ...], operator: str, spacing: tuple[float, ...], mode: str, device: torch.device
) -> Launch:
    """From components of volumes of `shape` (D, H, W)."""
    steps = march_length(volumes * math.prod(shape), shape[0])
    options = {
        "DIMS": len(spacing),
        "CENTRE": centre_tap(operator),
        "PADDING": mode,
        "BLOCK": BLOCK_ADJOINT,
        "num_warps": warps_on(NUM_WARPS, device),
    }
    numbers = (*shape, steps, *axis_scales(operator, spacing))
    return Launch(_adjoint_kernel, march_grid(volumes, shape, steps, BLOCK_ADJOINT), numbers, options)


def forward(image: Tensor, operator: str, spacing: tuple[float, ...], mode: str, reduction: str, eps: float) -> Tensor:
    """(N, M, *spatial) -> (N, 1, *spatial), float32."""
    x = as_volume(image)
    out = torch.empty((len(x), 1, *image.shape[2:]), dtype=torch.float32, device=image.device)
    s_n, _, *s_voxel = x.stride()
    strides = (*x.stride(), s_n, *s_voxel)
    launch = _sweep(False, x.shape, strides, operator, spacing, mode, reduction, eps, image.device)
    with torch.cuda.device_of(image):
        launch(x, x, out)
    return out


def backward(
    grad: Tensor, image: Tensor, operator: str, spacing: tuple[float, ...], mode: str, reduction: str, eps: float
) -> Tensor:
    """Gradient with respect to the image, contiguous, in its dtype."""
    n, channels, *spatial = image.shape
    device = image.device
    x, up = as_volume(image), as_volume(grad)
    s_n, _, *s_voxel = up.stride()
    components = torch.empty((n, channels, len(spatial), *spatial), dtype=torch.float32, device=device)
    result = torch.empty((n, channels, *spatial), dtype=image.dtype, device=device)
    strides = (*x.stride(), s_n, *s_voxel)
    sweep = _sweep(True, x.shape, strides, operator, spacing, mode, reduction, eps, device)
    adjoint = _adjoint(n * channels, x.shape[2:], operator, spacing, mode, device)
    with torch.cuda.device_of(image):
        sweep(x, up, components)
        adjoint(components, result)
    return result


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    flags: dict[str, tuple[Any, ...]] = {
        "dims": (2, 3),
        "channels": ("one", *CHANNEL_REDUCTIONS),
        "operator": OPERATORS,
        "padding": PADDING_MODES,
        "dtype": ("float32", "bfloat16", "float16"),
        "contiguous": (True, False),
    }
    sizes = dict.fromkeys(("D", "H", "W", "STEPS"), "i32")
    scales = dict.fromkeys(("scale_d", "scale_h", "scale_w"), "fp32")

    def common(f: Flags) -> tuple[dict[str, str], dict[str, Any]]:
        constants = {"DIMS": f["dims"], "CENTRE": centre_tap(f["operator"]), "PADDING": f["padding"]}
        if f["dims"] == 2:
            constants |= {"D": 1, "STEPS": 1}
        return sizes | scales, constants

    def sweep(backward: bool) -> Callable[[Flags], Arguments]:
        def arguments(f: Flags) -> Arguments:
            types, constants = common(f)
            pointer = pointer_type(f["dtype"])
            types |= {"p_image": pointer, "p_grad": "*fp32" if backward else pointer, "p_out": "*fp32"}
            strides = [name for name in _sweep_kernel.arg_names if name.startswith("s_")]
            types |= dict.fromkeys(strides, "int") | {"M": "i32", "eps": "fp32"}
            constants |= {"BACKWARD": backward, "CHANNELS": f["channels"]}
            constants["BLOCK"] = BLOCK_CHANNELS
            if f["channels"] == "one":
                constants |= {"M": 1, "BLOCK": BLOCK_ONE_CHANNEL}
            if f["contiguous"]:
                constants |= {"s_w": 1, "s_grad_w": 1}
            return Arguments(types, constants, NUM_WARPS)

        return arguments

    def adjoint(f: Flags) -> Arguments:
        types, constants = common(f)
        types |= {"p_in": "*fp32", "p_out": pointer_type(f["dtype"])}
        constants["BLOCK"] = BLOCK_ADJOINT
        return Arguments(types, constants, NUM_WARPS)

    adjoint_flags = {name: flags[name] for name in ("dims", "operator", "padding", "dtype")}
    return [
        KernelCases(_sweep_kernel, "gradient_magnitude", "forward", flags, sweep(False)),
        KernelCases(_sweep_kernel, "gradient_magnitude", "backward", flags, sweep(True)),
        KernelCases(_adjoint_kernel, "gradient_magnitude", "backward", adjoint_flags, adjoint),
    ]
