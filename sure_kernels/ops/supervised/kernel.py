"""Launchers of the supervised loss, whose sweeps are those of `evidential.kernel`, and what follows from its sums.

C = relu(r) with r = Cov(u, g) / std(g) over the boundary voxels of an image, for `correlation` relu(r + margin) with r
divided by std(u) as well; averaged over the images. F = the mean of u over voxels far from every boundary. With n
boundary voxels in an image and N images, where C > 0:

    dL/du_i = weight (g_i - mean g) / (N n std g)                                   covariance
    dL/du_i = the same / std u - weight r (u_i - mean u) / (N n var u)              correlation
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases
from sure_kernels.kernel_lib.launch import Launch, planned
from sure_kernels.ops.evidential import kernel as evidential
from sure_kernels.ops.evidential.closed_form import Formula, Weights, number_of_coefficients
from sure_kernels.ops.ranking.reference import FLAT
from sure_kernels.ops.supervised.closed_form import Supervision

_FLAT_SQUARE = tl.constexpr(FLAT**2)


@triton.jit
def _variance(square_mean, mean):
    """The variance (1 where there is none to rounding) and whether there is any."""
    variance = square_mean - mean * mean
    some = variance > square_mean * _FLAT_SQUARE
    return tl.where(some, variance, 1.0), some


@triton.jit
def _covariance(p_moments, m, sign, margin, CORRELATION: tl.constexpr):
    """(C, r, factor of g - mean g, 1 / n, var u, mean g, mean u) of images, [ROWS]; first three 0 where inactive."""
    n = tl.load(p_moments, mask=m, other=0.0)
    share = 1.0 / tl.maximum(n, 1.0)
    g_mean = tl.load(p_moments + 1, mask=m, other=0.0) * share
    u_mean = tl.load(p_moments + 3, mask=m, other=0.0) * share
    g_square = tl.load(p_moments + 2, mask=m, other=0.0)
    g_var, g_some = _variance(g_square * share, g_mean)
    u_var, u_some = _variance(tl.load(p_moments + 5, mask=m, other=0.0) * share, u_mean)
    usable = (n >= 2.0) & g_some
    scale = sign / tl.sqrt(g_var)
    if CORRELATION:
        usable = usable & u_some
        scale = scale / tl.sqrt(u_var)
    value = (tl.load(p_moments + 4, mask=m, other=0.0) * share - g_mean * u_mean) * scale
    active = usable & (value > -margin)
    r = tl.where(active, value, 0.0)
    # A magnitude that is not finite fails every comparison: it shall show in the loss.
    c = tl.where(active, value + margin, 0.0) + 0.0 * g_square
    return c, r, tl.where(active, scale * share, 0.0), share, u_var, g_mean, u_mean


@triton.jit(do_not_specialize=["images"])
def finalise_kernel(
    p_sums, p_table, p_loss, p_terms, p_coefficients, p_means,
    images,
    w_ace, w_kl, w_dice, w_gradient, w_far, sign, margin,
    K: tl.constexpr, ADAPTIVE: tl.constexpr, BACKGROUND: tl.constexpr, WEIGHTED: tl.constexpr,
    CORRELATION: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Loss, terms (5,), coefficients and means of each image from its sums: both ops' `finalise` in one launch."""
    COLUMNS: tl.constexpr = 12 + 3 * K
    COEFFICIENTS: tl.constexpr = 5 + 2 * K
    p_moments = p_sums + 4 + 3 * K
    far_n = tl.maximum(evidential.sum_column(p_moments + 6, images, COLUMNS, ROWS), 1.0)
    far = evidential.sum_column(p_moments + 7, images, COLUMNS, ROWS) / far_n
    c_far = (w_far / far_n).to(tl.float32)
    acc = tl.zeros([ROWS], tl.float64)
    for start in range(0, images, ROWS):
        o_row = start + tl.arange(0, ROWS)  # [ROWS]
        m = o_row < images
        o_row = o_row.to(tl.int64)
        c, r, factor, share, u_var, g_mean, u_mean = _covariance(
            p_moments + o_row * COLUMNS, m, sign, margin, CORRELATION
        )
        acc += c
        c_u = tl.zeros_like(r)
        if CORRELATION:
            c_u -= w_gradient * r * share / (images * u_var)
        p_row = p_coefficients + o_row * COEFFICIENTS + 2 + 2 * K
        tl.store(p_row, (w_gradient * factor / images).to(tl.float32), mask=m)
        tl.store(p_row + 1, c_u.to(tl.float32), mask=m)
        tl.store(p_row + 2, tl.zeros([ROWS], tl.float32) + c_far, mask=m)
        tl.store(p_means + 2 * o_row, g_mean.to(tl.float32), mask=m)
        tl.store(p_means + 2 * o_row + 1, u_mean.to(tl.float32), mask=m)
    # After the loop above: its registers are free then.
    ace, kl, dice, c_ace, c_kl, c_tp, c_p = evidential.finalised(
        p_sums, p_table, images, w_ace, w_kl, w_dice, K, COLUMNS, ADAPTIVE, BACKGROUND, WEIGHTED, CLASSES, ROWS
    )
    for i in range(0, images):
        p_row = p_coefficients + tl.cast(i, tl.int64) * COEFFICIENTS
        evidential.store_coefficients(p_row, c_ace, c_kl, c_tp, c_p, K, CLASSES)
    mean_c = tl.sum(acc) / images
    loss = w_ace * ace + w_kl * kl + w_dice * dice + w_gradient * mean_c + w_far * far
    tl.store(p_loss, loss.to(tl.float32))
    tl.store(p_terms, ace.to(tl.float32))
    tl.store(p_terms + 1, kl.to(tl.float32))
    tl.store(p_terms + 2, dice.to(tl.float32))
    tl.store(p_terms + 3, mean_c.to(tl.float32))
    tl.store(p_terms + 4, far.to(tl.float32))


class Finalised(NamedTuple):
    """Loss (), terms (5,), coefficients (N, number_of_coefficients) and (mean g, mean u) (N, 2), float32."""

    loss: Tensor
    terms: Tensor
    coefficients: Tensor
    means: Tensor


@planned
def _finaliser(
    images: int, formula: Formula, dice_form: str, include_background: bool, correlation: bool, device: torch.device
) -> Launch:
    """Without the weights of the terms, which may change at every step."""
    options = evidential.finalise_options(formula, dice_form, include_background) | {"CORRELATION": correlation}
    return Launch(finalise_kernel, (1,), (images, *(0.0,) * 7), options)


def finalise(sums: Tensor, formula: Formula, weights: Weights, supervision: Supervision) -> Finalised:
    """`finalise` of both closed forms in one launch, for the sums (N, number_of_sums) of one process."""
    n, device = len(sums), sums.device
    out = Finalised(
        torch.empty((), dtype=torch.float32, device=device),
        torch.empty(5, dtype=torch.float32, device=device),
        torch.empty((n, number_of_coefficients(formula.k, supervised=True)), dtype=torch.float32, device=device),
        torch.empty((n, 2), dtype=torch.float32, device=device),
    )
    numbers = (
        n, weights.ace, weights.kl, weights.dice, supervision.gradient_weight, supervision.far_weight,
        1.0 if supervision.relation == "decreasing" else -1.0, supervision.margin,
    )  # fmt: skip
    forms = (weights.dice_form, weights.include_background, supervision.form == "correlation")
    launch = _finaliser(n, formula, *forms, device)
    with torch.cuda.device_of(sums):
        launch(sums, evidential.table(formula, device), *out, numbers=numbers)
    return out


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`; the sweeps are in `evidential.kernel`."""

    def arguments(f: Flags) -> Arguments:
        types = dict.fromkeys(finalise_kernel.arg_names, "fp32") | {"images": "i32", "p_sums": "*fp64"}
        types |= dict.fromkeys(("p_table", "p_loss", "p_terms", "p_coefficients", "p_means"), "*fp32")
        return Arguments(types, evidential.finalise_constants(f) | {"CORRELATION": f["correlation"]}, num_warps=1)

    flags = evidential.finalise_flags() | {"correlation": (False, True)}
    return [KernelCases(finalise_kernel, "supervised_evidential_loss", "forward", flags, arguments)]
