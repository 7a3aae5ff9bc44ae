"""L_mu and L_far of the noise-uncertainty loss in Triton: one sweep for their sums, one for the gradient.

With maps u_0 (clean), ..., u_L at levels m_0 = 0, ..., m_L and x = -(u_l - u_k)(m_l - m_k) for every pair of a map
with the clean one and with its predecessor (Li et al., MICCAI 2025):

    sums      (sum of relu(x), #{x > 0}) of each pair over d <= near; (sum of u_0 + ... + u_L, number) over d > near
    gradient  du_l -= c_pair (m_l - m_k) [x > 0], du_k += the same over d <= near; du = c_far over d > near

Each program sweeps a few blocks of one image and stores its partial sums in float64; they are added in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib.launch import cdiv, warps_on
from sure_kernels.ops.noise.closed_form import Terms, number_of_rows


@triton.jit
def _load_maps(p_maps, o, m, MAPS: tl.constexpr):
    """The voxels `o` of every map in float32, [BLOCK] each."""
    u = ()
    for i in tl.static_range(MAPS):
        u += (tl.load(p_maps[i] + o, mask=m, other=0.0).to(tl.float32),)
    return u


@triton.jit
def _regions(p_distance, p_mask, o, m, near, HAS_MASK: tl.constexpr):
    """Whether each voxel is near, and whether it is far; neither where it does not count or d is NaN."""
    if HAS_MASK:
        m = m & (tl.load(p_mask + o, mask=m, other=0) != 0)
    d = tl.load(p_distance + o, mask=m, other=0.0)
    return m & (d <= near), m & (d > near)


@triton.jit
def _fall(u, k, gap, on):
    """x = -(u_l - u_k)(m_l - m_k) of the voxels `on`, 0 elsewhere."""
    return tl.where(on, (k - u) * gap, 0.0)


@triton.jit
def _positive(x):
    """relu(x), of which a NaN is a NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit(do_not_specialize=["steps"])
def sums_kernel(
    p_maps, p_levels, p_distance, p_mask, p_partial,
    voxels, steps, near,
    MAPS: tl.constexpr, RISING: tl.constexpr, FAR: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One column of p_partial (2 * number_of_rows, programs) a program; p_levels is (MAPS, images) float32."""
    i_program = tl.program_id(0).to(tl.int64)
    i_image = tl.program_id(1).to(tl.int64)
    images = tl.num_programs(1).to(tl.int64)
    voxels = tl.cast(voxels, tl.int64)
    o_first = i_image * voxels
    zero = tl.zeros([BLOCK], tl.float32)
    clean_sum, clean_number, step_sum, step_number = (), (), (), ()
    for _ in tl.static_range(1, MAPS):
        clean_sum += (zero,)
        clean_number += (zero,)
    for _ in tl.static_range(2, MAPS):
        step_sum += (zero,)
        step_number += (zero,)
    far_sum, far_number = zero, zero

    for step in range(0, steps):
        o = (i_program * steps + step) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within the image
        m = o < voxels
        u = _load_maps(p_maps, o_first + o, m, MAPS)
        on, away = _regions(p_distance, p_mask, o_first + o, m, near, HAS_MASK)
        if RISING:
            next_clean_sum, next_clean_number, next_step_sum, next_step_number = (), (), (), ()
            for i in tl.static_range(1, MAPS):
                level = tl.load(p_levels + i * images + i_image)
                x = _fall(u[i], u[0], level, on)
                next_clean_sum += (clean_sum[i - 1] + _positive(x),)
                next_clean_number += (clean_number[i - 1] + tl.where(x > 0.0, 1.0, 0.0),)
                if i > 1:
                    x = _fall(u[i], u[i - 1], level - tl.load(p_levels + (i - 1) * images + i_image), on)
                    next_step_sum += (step_sum[i - 2] + _positive(x),)
                    next_step_number += (step_number[i - 2] + tl.where(x > 0.0, 1.0, 0.0),)
            clean_sum, clean_number = next_clean_sum, next_clean_number
            step_sum, step_number = next_step_sum, next_step_number
        if FAR:
            total = zero
            for i in tl.static_range(MAPS):
                total += u[i]
            far_sum += tl.where(away, total, 0.0)
            far_number += tl.where(away, 1.0, 0.0)

    s_row = tl.num_programs(0).to(tl.int64) * images
    p_out = p_partial + i_image * tl.num_programs(0) + i_program
    for i in tl.static_range(1, MAPS):
        tl.store(p_out, tl.sum(clean_sum[i - 1]).to(tl.float64))
        tl.store(p_out + s_row, tl.sum(clean_number[i - 1]).to(tl.float64))
        p_out += 2 * s_row
    for i in tl.static_range(2, MAPS):
        tl.store(p_out, tl.sum(step_sum[i - 2]).to(tl.float64))
        tl.store(p_out + s_row, tl.sum(step_number[i - 2]).to(tl.float64))
        p_out += 2 * s_row
    tl.store(p_out, tl.sum(far_sum).to(tl.float64))
    tl.store(p_out + s_row, tl.sum(far_number).to(tl.float64))


@triton.jit
def gradient_kernel(
    p_maps, p_levels, p_distance, p_mask, p_coefficients, p_up, p_grads,
    voxels, near,
    MAPS: tl.constexpr, RISING: tl.constexpr, FAR: tl.constexpr, HAS_MASK: tl.constexpr,
    CLEAN: tl.constexpr, CLEAN_RISES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one image a program. p_grads holds the maps' gradients, the clean one's only where CLEAN."""
    i_image = tl.program_id(1).to(tl.int64)
    images = tl.num_programs(1).to(tl.int64)
    voxels = tl.cast(voxels, tl.int64)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], within the image
    m = o < voxels
    o += i_image * voxels
    on, away = _regions(p_distance, p_mask, o, m, near, HAS_MASK)
    up = tl.load(p_up).to(tl.float32)
    PAIRS: tl.constexpr = 2 * MAPS - 3
    base = tl.zeros([BLOCK], tl.float32)
    if FAR:
        base = tl.where(away, tl.load(p_coefficients + PAIRS) * up, 0.0)
    clean, before = base, base
    if RISING:
        u = _load_maps(p_maps, o, m, MAPS)
    for i in tl.static_range(1, MAPS):
        here = base
        if RISING:
            level = tl.load(p_levels + i * images + i_image)
            slope = tl.load(p_coefficients + (i - 1)) * up * level
            slope = tl.where(_fall(u[i], u[0], level, on) > 0.0, slope, 0.0)
            here -= slope
            if CLEAN_RISES:
                clean += slope
            if i > 1:
                gap = level - tl.load(p_levels + (i - 1) * images + i_image)
                slope = tl.load(p_coefficients + (MAPS + i - 3)) * up * gap
                slope = tl.where(_fall(u[i], u[i - 1], gap, on) > 0.0, slope, 0.0)
                here -= slope
                before += slope
        # A map's gradient is whole once its successor is known.
        if i > 1:
            p_grad = p_grads[i - 2 + CLEAN]
            tl.store(p_grad + o, before.to(p_grad.dtype.element_ty), mask=m)
        before = here
    p_grad = p_grads[MAPS - 2 + CLEAN]
    tl.store(p_grad + o, before.to(p_grad.dtype.element_ty), mask=m)
    if CLEAN:
        tl.store(p_grads[0] + o, clean.to(p_grads[0].dtype.element_ty), mask=m)


NUM_WARPS = 4
# Steps of a program on large volumes, and how many programs keep a GPU busy.
_STEPS, _ENOUGH_PROGRAMS = 16, 2048


def block_size(maps: int) -> int:
    """Voxels of a program at a time: four a thread, fewer where many maps take registers."""
    return 512 if maps <= 4 else 128


def _arguments(
    maps: Sequence[Tensor], levels: Tensor, distance: Tensor, mask: Tensor | None, terms: Terms
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs and options of both kernels."""
    inputs = (
        tuple(x.contiguous() for x in maps),
        levels.contiguous(),
        distance.contiguous(),
        distance if mask is None else mask.contiguous().view(torch.uint8),
    )
    options = {
        "MAPS": len(maps),
        "RISING": terms.rising,
        "FAR": terms.far,
        "HAS_MASK": mask is not None,
        "BLOCK": block_size(len(maps)),
        "num_warps": warps_on(NUM_WARPS, distance.device),
    }
    return inputs, options


def sums(maps: Sequence[Tensor], levels: Tensor, distance: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    """As `closed_form.sums`: (number_of_rows, 2) float64."""
    images, voxels = distance.shape
    block = block_size(len(maps))
    blocks = cdiv(voxels, block)
    steps = min(_STEPS, cdiv(images * blocks, _ENOUGH_PROGRAMS))
    programs = cdiv(blocks, steps)
    rows = 2 * number_of_rows(len(maps))
    partial = torch.empty((rows, images * programs), dtype=torch.float64, device=distance.device)
    inputs, options = _arguments(maps, levels, distance, mask, terms)
    with torch.cuda.device_of(distance):
        sums_kernel[(programs, images)](*inputs, partial, voxels, steps, terms.near, **options)
    return partial.sum(1).view(-1, 2)


def gradient(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    mask: Tensor | None,
    coefficients: Tensor,
    upstream: Tensor,
    terms: Terms,
    clean: bool,
    clean_rises: bool,
) -> list[Tensor]:
    """As `closed_form.gradient`; the 0-d `upstream` multiplies the coefficients on the device."""
    images, voxels = distance.shape
    block = block_size(len(maps))
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps[0 if clean else 1 :]]
    inputs, options = _arguments(maps, levels, distance, mask, terms)
    with torch.cuda.device_of(distance):
        gradient_kernel[(cdiv(voxels, block), images)](
            *inputs, coefficients.float(), upstream, tuple(out), voxels, terms.near,
            CLEAN=int(clean), CLEAN_RISES=clean_rises and clean, **options,
        )  # fmt: skip
    return out


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    flags: dict[str, tuple[Any, ...]] = {
        "maps": (2, 3, 4, 5, 8),
        "terms": ("both", "rising", "far"),
        "mask": (False, True),
        "dtype": ("float32", "bfloat16", "float16"),
    }

    def arguments(kernel: Any, f: Flags) -> Arguments:
        maps, pointer = f["maps"], pointer_type(f["dtype"])
        types: dict[str, Any] = {name: "*fp32" for name in kernel.arg_names if name.startswith("p_")}
        types |= {"p_maps": (pointer,) * maps, "p_mask": "*u8", "p_partial": "*fp64"}
        types |= {"voxels": "int", "steps": "i32", "near": "fp32"}
        constants = {
            "MAPS": maps,
            "RISING": f["terms"] != "far",
            "FAR": f["terms"] != "rising",
            "HAS_MASK": f["mask"],
            "BLOCK": block_size(maps),
        }
        if "clean" in f:
            clean = f["clean"] != "none"
            types |= {"p_grads": (pointer,) * (maps - 1 + clean)}
            constants |= {"CLEAN": int(clean), "CLEAN_RISES": f["clean"] == "rises"}
        return Arguments(types, constants, NUM_WARPS)

    backward = flags | {"clean": ("none", "far", "rises")}
    return [
        KernelCases(kernel, "noise_uncertainty_loss", direction, f, functools.partial(arguments, kernel))
        for kernel, direction, f in ((sums_kernel, "forward", flags), (gradient_kernel, "backward", backward))
    ]
