"""The two sweeps of `closed_form` in Triton: sums of an image, then dL/dz, with or without source.

Per voxel with label y, e = act(z), a = e + b, S = sum a, B = sum b, t = sum of e over the wrong classes:

    digamma ACE = psi(S) - psi(a_y),  log ACE = ln S - ln a_y,
    mse ACE     = F sum q^2 + sum q (1 - q) / (S + 1)        q = 1 - p_y for the true class, p_k elsewhere
    KL          = sum over wrong k of D(a_k, b_k) - D(t + B, B)
    vacuity u   = B / S

(Sensoy, Kaplan, Kandemir, NeurIPS 2018; Li, Sui, Wu, Zhuang, MICCAI 2025). The sums and coefficients are those of
`closed_form`, in its order.

A program marches: it holds BLOCK neighbours of a plane and goes through `march` planes. Where the gradient magnitude
is filtered on the way (GRADIENT = 2) planes are those of the volume, and the parts of two of them stay in registers.
Otherwise a "plane" is simply BLOCK voxels of the flat image. Partial sums are float32 within a program and float64
between programs, added in a fixed order; the partition depends on the shape alone, so results repeat to the bit.

With a unit prior and no class weights the logarithms are deferred: a lane keeps mantissa products and exponent sums
of its voxels and takes three logarithms at the end. Instructions bind the sweeps: `python -m benchmarks instructions`
counts those of the main loops without a GPU, docs/performance.md has its table.

Logits may have any even spacing of voxels (others are copied first); channels-last ones are read with a stride.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib import device_special as special
from sure_kernels.kernel_lib import device_taps as taps
from sure_kernels.kernel_lib import labels, minimax
from sure_kernels.kernel_lib.chunks import flat
from sure_kernels.kernel_lib.launch import (
    Launch,
    axis_scales,
    cdiv,
    centre_tap,
    gradient_format,
    march_length,
    planned,
    warps_on,
)
from sure_kernels.kernel_lib.special import EVIDENCE, concentration
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES
from sure_kernels.ops.evidential.closed_form import Formula, Weights, number_of_coefficients, number_of_sums
from sure_kernels.ops.evidential.reference import SMOOTH_TARGET, SOFT_DICE_EPS, TVERSKY_EPS
from sure_kernels.ops.gradient_magnitude import kernel as gradient_magnitude

# GRADIENT: where the magnitude of the image's gradient comes from.
NO_GRADIENT, CACHED, MARCHED, FILTERED = 0, 1, 2, 3

_BOUNDARY = tl.constexpr(labels.BOUNDARY)
_FAR = tl.constexpr(labels.FAR)
_NO_CLASS = tl.constexpr(-1)
_BIAS = tl.constexpr(127)
# So many numbers, one a class, are kept in registers rather than looked up.
_FEW_CLASSES = tl.constexpr(4)
# Whether a voxel is of a class, for so many classes, is kept from one loop over them to the next.
_FEW_PREDICATES = tl.constexpr(8)
# A logit of no evidence, the slope of which is 0 as well; and its bits.
_NO_EVIDENCE = tl.constexpr(-(2.0**100))
_NO_EVIDENCE_BITS = tl.constexpr(np.float32(-(2.0**100)).view(np.int32).item())
# lgamma of 1, 2, ...
_LGAMMA = tl.constexpr(tuple(math.lgamma(i + 1) for i in range(32)))
# Half the logarithm of 1 + SHIFT.
_HALF_LN_Y_ONE = tl.constexpr(0.5 * math.log1p(minimax.SHIFT))
_EULER_GAMMA = tl.constexpr(0.5772156649015329)
_SMOOTH_TARGET = tl.constexpr(SMOOTH_TARGET)
_TVERSKY_EPS = tl.constexpr(TVERSKY_EPS)
_SOFT_DICE_EPS = tl.constexpr(SOFT_DICE_EPS)


@triton.jit
def _load(p, m, WHOLE: tl.constexpr):
    """What `p` points to; `m` says where there is anything, which with WHOLE is everywhere."""
    if WHOLE:
        return tl.load(p)
    else:
        return tl.load(p, mask=m, other=0)


@triton.jit
def _load_label(p_label, p_mask, o_voxel, m, ignore_index, HAS_MASK: tl.constexpr, WHOLE: tl.constexpr):
    """Label (int32; _NO_CLASS for one of 64 bits that they do not hold) and whether the voxel counts, [BLOCK] each."""
    b_raw = _load(p_label + o_voxel, m, WHOLE)
    counted = m & (b_raw != ignore_index)
    if HAS_MASK:
        counted = counted & (_load(p_mask + o_voxel, m, WHOLE) != 0)
    b_label = b_raw.to(tl.int32)
    if b_raw.dtype.primitive_bitwidth > 32:
        b_label = tl.where((b_raw >> 32) == 0, b_label, _NO_CLASS)
    return b_label, counted


@triton.jit
def _load_logit(p_z, o_z, m, counted, REST: tl.constexpr, WHOLE: tl.constexpr):
    """Logit as float32, or REST where the voxel does not count."""
    # Replaced, not multiplied by 0: NaN logits in voxels that do not count must not reach the sums.
    raw = _load(p_z + o_z, m, WHOLE)
    if raw.dtype == tl.bfloat16:
        # Its bits are the upper half of float32's: moved up or wiped out in one multiplication of integers.
        bits = raw.to(tl.uint16, bitcast=True).to(tl.int32) * tl.where(counted, 1 << 16, 0)
        if REST != 0.0:
            bits += tl.where(counted, 0, _NO_EVIDENCE_BITS)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.where(counted, raw.to(tl.float32), REST)


@triton.jit
def _own(p_table, b_label, K: tl.constexpr):
    """The entry of a table of K numbers that belongs to the voxel's label (any one where it has none)."""
    return tl.load(p_table + tl.minimum(tl.maximum(b_label, 0), K - 1))


@triton.jit
def _cross_entropy(
    a_y, gap, total, inverse, squares, error_factor, KIND: tl.constexpr, BELOW_ONE: tl.constexpr
):  # fmt: skip
    """ACE of a voxel; `squares` is the sum of a^2 over the wrong classes, `gap` S - a_y and `inverse` 1 / S."""
    if KIND == "digamma":
        return special.digamma_difference(a_y, gap, BELOW_ONE)
    elif KIND == "log":
        return special.ln1p(gap * special.reciprocal(a_y))
    else:
        # sum q = 2 gap / S: neither sum cancels where the voxel is certain.
        q_y = gap * inverse
        q_square = q_y * q_y + squares * inverse * inverse
        return error_factor * q_square + (2.0 * q_y - q_square) * special.reciprocal(total + 1.0)


@triton.jit
def _kl_of_sum(t, b_y, b_label, prior_sum, p_table, official, K, BELOW_ONE: tl.constexpr):
    """What KL has besides the wrong classes' own terms; `official` puts 1 in place of the true class's prior."""
    excess = official * (1.0 - b_y)
    # (1 - b_y) psi(1) - lgamma(1) + lgamma(b_y), and what is linear in 1 - b_y.
    own = official * _own(p_table + K, b_label, K) - excess * (1.0 + _EULER_GAMMA)
    return own - _share_of_sum(t + excess, prior_sum, p_table, K, BELOW_ONE)


@triton.jit
def _share_of_sum(t, prior_sum, p_table, K, BELOW_ONE: tl.constexpr):
    return special.kl_share(t, prior_sum, p_table + 6 * K, 1, BELOW_ONE)


@triton.jit
def _slopes(
    a_y, gap, total, inverse, squares, excess, dp_a, c_tp, w_ace, w_kl, prior_sum, error_factor,
    KIND: tl.constexpr, BELOW_ONE: tl.constexpr,
):  # fmt: skip
    """dL/da of the true class and of a wrong one, and what the latter has besides per unit of its a.

    `dp_a` is the sum of dL/dp_k a_k for Dice, and of dL/du sum b for supervision; `c_tp` is Dice's dL/dTP_y. What
    belongs to one class alone is not in here: see `_class_slope`.
    """
    inverse_square = inverse * inverse
    da_own = c_tp * inverse
    per_a = tl.zeros_like(inverse)
    if KIND == "digamma":
        da_all = w_ace * special.trigamma(total, BELOW_ONE)
    elif KIND == "log":
        da_all = w_ace * inverse
        da_own -= w_ace * special.reciprocal(a_y)
    else:
        # Derivative by p_k: 2 F (p_k, or -q_y for the true class) - 2 p_k / (S + 1).
        next_inverse = special.reciprocal(total + 1.0)
        q_y, p_y, wrong_square = gap * inverse, a_y * inverse, squares * inverse_square
        variance = 2.0 * q_y - (q_y * q_y + wrong_square)
        dp_y = -2.0 * (error_factor * q_y + p_y * next_inverse)
        dp_wrong = 2.0 * (error_factor - next_inverse)
        mean_dp = p_y * dp_y + wrong_square * dp_wrong
        da_all = -w_ace * (mean_dp * inverse + variance * next_inverse * next_inverse)
        da_own += w_ace * dp_y * inverse
        per_a = w_ace * dp_wrong * inverse_square
    da_all -= dp_a * inverse_square
    if BELOW_ONE:
        slope = special.kl_term_slope(prior_sum + excess, prior_sum, True)
    else:
        _, slope = special.trigamma_and_kl_slope(excess, prior_sum)
    return da_all + da_own, da_all - w_kl * slope, per_a


@triton.jit
def _class_slope(e, b, is_y, KIND: tl.constexpr, BELOW_ONE: tl.constexpr):
    """What a class has to itself: the slope of its KL term, or for the true one that of psi(a_y)."""
    if BELOW_ONE:
        trigamma, slope = special.trigamma(e + b, True), special.kl_term_slope(e + b, b, True)
    else:
        trigamma, slope = special.trigamma_and_kl_slope(e, b)
    if KIND == "digamma":
        slope = tl.where(is_y, trigamma, slope)
    return slope


@triton.jit
def _class_da(slope, is_y, da_own, da_wrong, w_ace, w_kl, KIND: tl.constexpr):
    """dL/da of a class, from its `_class_slope`, but for what Dice has."""
    if KIND == "digamma":
        da_own -= w_ace * slope
    return tl.where(is_y, da_own, da_wrong + w_kl * slope)


@triton.jit
def _load_supervision(p_coefficients, p_means, factor):
    """(c_g, c_u, c_far, mean g, mean u) of an image, the first three times `factor`."""
    return (
        tl.load(p_coefficients) * factor, tl.load(p_coefficients + 1) * factor, tl.load(p_coefficients + 2) * factor,
        tl.load(p_means), tl.load(p_means + 1),
    )  # fmt: skip


@triton.jit
def _supervised_slope(supervision, on, b_band, u, g):
    """dL/du of the supervision: c_g (g - mean g) + c_u (u - mean u) on the boundary, c_far far from it."""
    c_g, c_u, c_far, g_mean, u_mean = supervision
    return tl.where(on, c_g * (g - g_mean) + c_u * (u - u_mean), tl.where(b_band == _FAR, c_far, 0.0))


@triton.jit
def _weight(p_table, b_label, K: tl.constexpr):
    """The class weight of the voxel's label, 0 where it has none."""
    return tl.where((b_label >= 0) & (b_label < K), _own(p_table + 2 * K, b_label, K), 0.0)


@triton.jit
def _program(i_program, plane, depth, march, BLOCK: tl.constexpr):
    """(first voxel in its plane, first plane, plane after the last) of this program."""
    blocks = tl.cdiv(plane, BLOCK)
    z_first = ((i_program // blocks).to(tl.int64) * march).to(tl.int32)
    return i_program % blocks * BLOCK, z_first, tl.minimum(z_first + march, depth)


@triton.jit
def _lanes(start, plane, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Voxels of the block within its plane, and which of them there are, [BLOCK].

    Where planes are WHOLE, as large as each other, lanes past their end read the last voxel, and it does not count.
    """
    o_plane = start + tl.arange(0, BLOCK)
    m_plane = o_plane < plane
    if WHOLE:
        o_plane = tl.minimum(o_plane, plane - 1)
    return o_plane, m_plane


@triton.jit
def _step(z, depth, plane, GRADIENT: tl.constexpr, PADDING: tl.constexpr):
    """How far it is from plane z to the next: where GRADIENT filters, to the image's that stands for z + 1.

    Where planes begin is then no multiple of z to the compiler, which otherwise moves a pointer for each tensor and
    class along.
    """
    if GRADIENT >= 2:
        return taps.plane_step(z, depth, plane, PADDING)
    else:
        return plane


@triton.jit
def _marched(
    planes, p_march, ahead, z, o_plane, o_h, o_w, D, H, W, scale_d, scale_h, scale_w,
    CENTRE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Gradient magnitude of plane z of one channel, [BLOCK], and `planes` for the next.

    Plane z + 1, or what stands for it, lies `ahead` voxels after `p_march`.
    """
    after = taps.parts_ahead(p_march, ahead, o_plane, z + 1 < D, o_h, o_w, H, W, W, 1, CENTRE, PADDING)
    derivatives, planes = taps.march(planes, after, z, D, scale_d, scale_h, scale_w, CENTRE, PADDING)
    gd, gh, gw = derivatives
    return tl.sqrt(gd * gd + gh * gh + gw * gw), planes


@triton.jit
def _filtered(
    p_image, z, o_h, o_w, channels, voxels, plane, D, H, W, scale_d, scale_h, scale_w,
    DIMS: tl.constexpr, CENTRE: tl.constexpr, PADDING: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Gradient magnitude of plane z, all channels, without marching, [BLOCK]."""
    result = tl.zeros(o_h.shape, tl.float32)
    for c in range(0, channels):
        gd, gh, gw = taps.voxel_gradient(
            p_image + c * voxels, z, o_h, o_w, D, H, W, plane, W, 1,
            scale_d, scale_h, scale_w, DIMS, CENTRE, PADDING,
        )  # fmt: skip
        square = gd * gd + gh * gh + gw * gw
        if REDUCTION == "l2":
            result += square
        elif REDUCTION == "max":
            result = tl.maximum(result, square, propagate_nan=tl.PropagateNan.ALL)
        else:
            result += tl.sqrt(square)
    if REDUCTION == "mean":
        return result * (1.0 / channels)
    else:
        return tl.sqrt(result)


@triton.jit
def _add_moments(moments, b_band, counted, inverse, g):
    """Moments of g and 1 / S on the boundary about the lane's first ones, which cannot cancel, and sums far from it."""
    n, g0, r0, sg, sr, sgg, sgr, srr, far_n, far_r = moments
    on = counted & (b_band == _BOUNDARY)
    far = counted & (b_band == _FAR)
    first = on & (n == 0.0)
    g0 = tl.where(first, g, g0)
    r0 = tl.where(first, inverse, r0)
    dg = g - g0
    dr = inverse - r0
    return (
        tl.where(on, n + 1.0, n), g0, r0, tl.where(on, sg + dg, sg), tl.where(on, sr + dr, sr),
        tl.where(on, sgg + dg * dg, sgg), tl.where(on, sgr + dg * dr, sgr), tl.where(on, srr + dr * dr, srr),
        tl.where(far, far_n + 1.0, far_n), tl.where(far, far_r + inverse, far_r),
    )  # fmt: skip


@triton.jit
def _sums_of(values, FIRST: tl.constexpr, NUMBER: tl.constexpr):
    """Sums of NUMBER (a power of two) of the [BLOCK] tensors `values`, in one reduction: a tuple of scalars."""
    tensors = values[FIRST : FIRST + NUMBER]
    for level in tl.static_range(6):
        if NUMBER >> level > 1:
            pairs = ()
            for i in tl.static_range(NUMBER >> (level + 1)):
                pairs += (tl.join(tensors[i], tensors[i + (NUMBER >> (level + 1))]),)
            tensors = pairs
    sums = (tl.sum(tensors[0], 0),)
    for level in tl.static_range(6):
        if 1 << level < NUMBER:
            ones, others = (), ()
            for i in tl.static_range(1 << level):
                one, other = tl.split(sums[i])
                ones += (one,)
                others += (other,)
            sums = ones + others
    return sums


@triton.jit
def _sums(values, NUMBER: tl.constexpr):
    """Sums of the NUMBER [BLOCK] tensors `values`, scalars: in few reductions, for the barriers in each."""
    sums = ()
    for level in tl.static_range(7):
        # Pieces by the bits of NUMBER, larger ones first.
        if (NUMBER & (64 >> level)) != 0:
            sums += _sums_of(values, NUMBER - NUMBER % (128 >> level), 64 >> level)
    return sums


@triton.jit
def _store_moments(p_out, s_column, moments, number, g_sum, r_sum, far_n, far_r, prior_sum):
    """Lanes' moments -> of g and u about the program's means, float32 -> raw ones, float64, which programs can add.

    The scalars are sums: `number` of n, `g_sum` and `r_sum` of g and 1 / S on the boundary, `far_n` and `far_r`.
    """
    n, g0, r0, sg, sr, sgg, sgr, srr, _, _ = moments
    safe = tl.maximum(number, 1.0)
    g_mean, r_mean = g_sum / safe, r_sum / safe
    dg = tl.where(n > 0.0, g0 - g_mean, 0.0)
    dr = tl.where(n > 0.0, r0 - r_mean, 0.0)
    about_means = (
        sg + n * dg, sgg + dg * (2.0 * sg + n * dg), sr + n * dr, sgr + dg * sr + dr * (sg + n * dg),
        srr + dr * (2.0 * sr + n * dr),
    )  # fmt: skip
    g1, gg, r1, gr, rr = _sums(about_means, 5)
    n64, gm, um, b = number.to(tl.float64), g_mean.to(tl.float64), r_mean.to(tl.float64) * prior_sum, prior_sum
    g1, gg, u1, gu, uu = (
        g1.to(tl.float64),
        gg.to(tl.float64),
        r1.to(tl.float64) * b,
        gr.to(tl.float64) * b,
        rr.to(tl.float64) * b * b,
    )
    tl.store(p_out, n64)
    tl.store(p_out + s_column, g1 + n64 * gm)
    tl.store(p_out + 2 * s_column, gg + gm * (2.0 * g1 + n64 * gm))
    tl.store(p_out + 3 * s_column, u1 + n64 * um)
    tl.store(p_out + 4 * s_column, gu + gm * u1 + um * (g1 + n64 * gm))
    tl.store(p_out + 5 * s_column, uu + um * (2.0 * u1 + n64 * um))
    tl.store(p_out + 6 * s_column, far_n.to(tl.float64))
    tl.store(p_out + 7 * s_column, far_r.to(tl.float64) * b)


@triton.jit(do_not_specialize=["depth", "march", "channels", "D", "H", "W", "ignore_index"])
def sums_kernel(
    p_z, p_label, p_mask, p_band, p_image, p_table, p_partial,
    voxels, plane, depth, march, channels, D, H, W,
    s_image, s_class, s_voxel,
    ignore_index, prior_sum, error_factor, official, scale_d, scale_h, scale_w,
    K: tl.constexpr, KIND: tl.constexpr, EVIDENCE: tl.constexpr, UNIT_PRIOR: tl.constexpr, BELOW_ONE: tl.constexpr,
    WEIGHTED: tl.constexpr, HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, DIMS: tl.constexpr,
    CENTRE: tl.constexpr, PADDING: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of partial sums a program: p_partial is (N, number_of_sums, programs) float64.

    p_table is a `table`; it is read unless UNIT_PRIOR and not WEIGHTED. `official` is 1.0 where the true class's prior
    counts as 1 in KL.
    """
    i_program = tl.program_id(0)
    i_image = tl.program_id(1).to(tl.int64)
    s_class, s_voxel = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    voxels = tl.cast(voxels, tl.int64)
    WHOLE: tl.constexpr = GRADIENT >= 2
    start, z_first, z_end = _program(i_program, plane, depth, march, BLOCK)
    o_plane, m_plane = _lanes(start, plane, BLOCK, WHOLE)
    p_z += i_image * s_image
    p_label += i_image * voxels
    p_mask += i_image * voxels
    p_band += i_image * voxels
    p_image += i_image * channels * voxels

    zero = tl.zeros([BLOCK], tl.float32)
    one = zero + 1.0
    DEFERRED: tl.constexpr = UNIT_PRIOR and not WEIGHTED
    # Factors between two normalisations of a product: four of up to 2^31 stay below the largest float32.
    FACTORS: tl.constexpr = 4
    m_ratio, m_wrong, m_total = one, one, one
    none = tl.zeros([BLOCK], tl.int32)
    k_ratio, k_wrong, k_total = none, none, none
    acc_n, acc_w, acc_ace, acc_kl, acc_inverse = zero, zero, zero, zero, zero
    acc_tp, acc_e, acc_y, prior = (), (), (), ()
    for c in tl.static_range(K):
        acc_tp += (zero,)
        acc_e += (zero,)
        acc_y += (zero,)
        if UNIT_PRIOR:
            prior += (1.0,)
        else:
            prior += (tl.load(p_table + c),)
    kl_start = zero
    if UNIT_PRIOR:
        # 1.0, read for `split_exponent`.
        one_read = tl.load(p_table)
        one_bits = one_read.to(tl.int32, bitcast=True)
        # A class without evidence has no KL; what the polynomial makes of it is known to the bit, and taken off.
        t_one = special.reciprocal_fast(one_read + special.SHIFT)
        no_evidence = special.add_kl_term_one_polynomial(0.0, t_one) - _HALF_LN_Y_ONE
        kl_start += (K - 1) * special.KL_TERM_ONE_CONSTANT - no_evidence
    if DEFERRED:
        # Constants are added to the sums, where they cost no bits.
        kl_start = zero
    moments = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    if GRADIENT >= 2:
        o_h, o_w = taps.plane_position(start, W, BLOCK)
    if GRADIENT == 2:
        planes = taps.first_planes(p_image, z_first, o_h, o_w, D, H, W, plane, W, 1, CENTRE, PADDING)
    o_first = tl.cast(z_first, tl.int64) * plane
    p_march, ahead = p_image + o_first, 0

    for z in range(z_first, z_end):
        step = _step(z, depth, plane, GRADIENT, PADDING)
        if GRADIENT == 2:
            ahead += tl.cast(step, tl.int32)
        o_voxel = o_first + o_plane
        m = m_plane
        if not WHOLE:
            m = o_plane < tl.minimum(voxels - o_first, plane).to(tl.int32)
        b_label, counted = _load_label(p_label, p_mask, o_voxel, m, ignore_index, HAS_MASK, WHOLE)
        b_label = tl.where(counted, b_label, _NO_CLASS)

        # 1. Evidence, and over the wrong classes: its sum t, KL's terms, and sum a^2 for `mse`.
        e_y, t, squares, evidences = zero, zero, zero, ()
        kl = kl_start
        factor = one
        for c in tl.static_range(K):
            e = special.evidence(_load_logit(p_z + c * s_class, o_voxel * s_voxel, m, counted, 0.0, WHOLE), EVIDENCE)
            evidences += (e,)
            is_y = b_label == c
            e_wrong = tl.where(is_y, 0.0, e)
            e_y = tl.where(is_y, e, e_y)
            if c == 0:
                t = e_wrong
            else:
                t += e_wrong
            if KIND == "mse":
                squares = tl.where(is_y, squares, squares + (e + prior[c]) * (e + prior[c]))
            if UNIT_PRIOR:
                # The true class's term, of evidence 0, is taken off in `kl_start`.
                y = e_wrong + (1.0 + special.SHIFT)
                kl = special.add_kl_term_one_polynomial(kl, special.reciprocal_fast(y))
                if c % FACTORS == 0:
                    factor = y
                else:
                    factor *= y
                if c % FACTORS == FACTORS - 1 or c == K - 1:
                    if DEFERRED:
                        m_wrong, k = special.split_exponent(tl.where(counted, m_wrong * factor, m_wrong), one_bits)
                        k_wrong += k
                    else:
                        kl -= 0.5 * special.ln(factor)
            else:
                kl = tl.where(is_y, kl, kl + special.kl_share(e, prior[c], p_table + 3 * K + c, K, BELOW_ONE))

        # 2. The sums of concentrations.
        b_y = one
        if not UNIT_PRIOR:
            b_y = _own(p_table, b_label, K)
        a_y = e_y + b_y
        gap = t + (prior_sum - b_y)  # S - a_y, without cancellation
        total = a_y + gap
        inverse = special.reciprocal(total)

        # 3. Expected cross-entropy.
        if DEFERRED and KIND == "digamma":
            t_y = special.reciprocal(e_y + (1.0 + special.SHIFT))
            t_total = special.reciprocal_fast(total + special.SHIFT)
            m_ratio = tl.where(counted, m_ratio * (1.0 + gap * t_y), m_ratio)
            ace = special.digamma_polynomial(t_total) - special.digamma_polynomial(t_y)
        elif DEFERRED and KIND == "log":
            m_ratio = tl.where(counted, m_ratio * (1.0 + gap * special.reciprocal(a_y)), m_ratio)
            ace = zero
        else:
            ace = _cross_entropy(a_y, gap, total, inverse, squares, error_factor, KIND, BELOW_ONE)

        # 4. KL.
        if DEFERRED:
            y = t + (K + special.SHIFT)
            kl = special.subtract_kl_term_polynomial(kl, special.reciprocal_fast(y), K)
            m_total = tl.where(counted, m_total * y, m_total)
            m_total, k = special.split_exponent(m_total, one_bits)
            k_total += k
            if KIND != "mse":
                m_ratio, k = special.split_exponent(m_ratio, one_bits)
                k_ratio += k
        elif UNIT_PRIOR:
            kl -= _share_of_sum(t, prior_sum, p_table, K, BELOW_ONE)
        else:
            kl += _kl_of_sum(t, b_y, b_label, prior_sum, p_table, official, K, BELOW_ONE)

        # 5. Running sums.
        count = tl.where(counted, 1.0, 0.0)
        acc_n += count
        if WEIGHTED:
            weight = _weight(p_table, b_label, K)
            acc_w += weight
            ace *= weight
            kl *= weight
        acc_ace += count * ace
        acc_kl += count * kl
        counted_inverse = count * inverse
        acc_inverse += counted_inverse
        p_y = a_y * counted_inverse
        next_tp, next_e, next_y = (), (), ()
        for c in tl.static_range(K):
            is_y = b_label == c
            next_tp += (tl.where(is_y, acc_tp[c] + p_y, acc_tp[c]),)
            next_e += (acc_e[c] + evidences[c] * counted_inverse,)
            next_y += (tl.where(is_y, acc_y[c] + 1.0, acc_y[c]),)
        acc_tp, acc_e, acc_y = next_tp, next_e, next_y

        # 6. Supervision.
        if GRADIENT != 0:
            b_band = _load(p_band + o_voxel, m, WHOLE)
            if GRADIENT == 1:
                on = counted & (b_band == _BOUNDARY)
                g = tl.load(p_image + o_voxel, mask=on, other=0.0).to(tl.float32)
            elif GRADIENT == 2:
                g, planes = _marched(
                    planes, p_march, ahead, z, o_plane, o_h, o_w, D, H, W, scale_d, scale_h, scale_w, CENTRE, PADDING
                )
            else:
                g = _filtered(
                    p_image, z, o_h, o_w, channels, voxels, plane, D, H, W, scale_d, scale_h, scale_w,
                    DIMS, CENTRE, PADDING, REDUCTION,
                )  # fmt: skip
            moments = _add_moments(moments, b_band, counted, inverse, g)
        o_first += step

    ace, kl = acc_ace, acc_kl
    if DEFERRED:
        kl += (K - 0.5) * special.ln(m_total) - 0.5 * special.ln(m_wrong)
        if KIND != "mse":
            ace += special.ln(m_ratio)
    NUMBER: tl.constexpr = 5 + 3 * K + (5 if GRADIENT != 0 else 0)
    values = (acc_n, acc_w, ace, kl, acc_inverse)
    values += acc_tp
    values += acc_e
    values += acc_y
    if GRADIENT != 0:
        n, g0, r0, sg, sr = moments[0], moments[1], moments[2], moments[3], moments[4]
        values += (n, n * g0 + sg, n * r0 + sr, moments[8], moments[9])
    sums = _sums(values, NUMBER)
    number, inverse_sum = sums[0].to(tl.float64), sums[4].to(tl.float64)
    ace_sum, kl_sum = sums[2].to(tl.float64), sums[3].to(tl.float64)
    if DEFERRED:
        # Exponents are added as integers: as large as the sums are, float32 would cost them bits.
        biases = tl.maximum(z_end - z_first, 0) * (BLOCK * _BIAS)
        products: tl.constexpr = (K + FACTORS - 1) // FACTORS
        exponents = tl.sum((2 * K - 1) * k_total - k_wrong) - (2 * K - 1 - products) * biases
        kl_sum += (0.5 * special.LN_2) * exponents.to(tl.float64)
        if KIND != "mse":
            ace_sum += special.LN_2 * (tl.sum(k_ratio) - biases).to(tl.float64)
        constant: tl.constexpr = (K - 1) * special.KL_TERM_ONE_CONSTANT + special.KL_TERM_CONSTANT - K - _LGAMMA[K - 1]
        kl_sum += number * (constant - no_evidence.to(tl.float64))

    columns: tl.constexpr = 4 + 3 * K + (8 if GRADIENT != 0 else 0)
    s_column = tl.num_programs(0).to(tl.int64)
    p_out = p_partial + i_image * columns * s_column + i_program
    tl.store(p_out, number)
    tl.store(p_out + s_column, sums[1].to(tl.float64) if WEIGHTED else number)
    tl.store(p_out + 2 * s_column, ace_sum)
    tl.store(p_out + 3 * s_column, kl_sum)
    p_out += 4 * s_column
    for c in tl.static_range(K):
        tl.store(p_out + c * s_column, sums[5 + c].to(tl.float64))
        tl.store(p_out + (K + c) * s_column, sums[5 + K + c].to(tl.float64) + inverse_sum * prior[c])
        tl.store(p_out + (2 * K + c) * s_column, sums[5 + 2 * K + c].to(tl.float64))
    if GRADIENT != 0:
        i: tl.constexpr = 5 + 3 * K
        _store_moments(
            p_out + 3 * K * s_column, s_column, moments,
            sums[i], sums[i + 1], sums[i + 2], sums[i + 3], sums[i + 4], prior_sum,
        )  # fmt: skip


@triton.jit(do_not_specialize=["K", "ignore_index"])
def many_sums_kernel(
    p_z, p_label, p_mask, p_band, p_image, p_table, p_partial,
    voxels, K,
    s_image, s_class, s_voxel,
    ignore_index, prior_sum, error_factor, official,
    KIND: tl.constexpr, EVIDENCE: tl.constexpr, BELOW_ONE: tl.constexpr, HAS_MASK: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums_kernel` with a loop over the classes, twice: for more of them than registers hold. One block a program."""
    i_program = tl.program_id(0).to(tl.int64)
    i_image = tl.program_id(1).to(tl.int64)
    K, voxels = tl.cast(K, tl.int64), tl.cast(voxels, tl.int64)
    s_class, s_voxel = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    o_voxel = i_program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o_voxel < voxels
    p_z += i_image * s_image
    o_first = i_image * voxels
    b_label, counted = _load_label(p_label + o_first, p_mask + o_first, o_voxel, m, ignore_index, HAS_MASK, False)
    b_label = tl.where(counted, b_label, _NO_CLASS)

    e_y = tl.zeros([BLOCK], tl.float32)
    t, squares, kl = e_y, e_y, e_y
    for c in range(0, K):
        e = special.evidence(_load_logit(p_z + c * s_class, o_voxel * s_voxel, m, counted, 0.0, False), EVIDENCE)
        is_y = b_label == c
        b = tl.load(p_table + c)
        a = e + b
        e_y = tl.where(is_y, e, e_y)
        t = tl.where(is_y, t, t + e)
        squares = tl.where(is_y, squares, squares + a * a)
        kl = tl.where(is_y, kl, kl + special.kl_share(e, b, p_table + 3 * K + c, K, BELOW_ONE))
    b_y = _own(p_table, b_label, K)
    a_y = e_y + b_y
    gap = t + (prior_sum - b_y)
    total = a_y + gap
    inverse = special.reciprocal(total)
    ace = _cross_entropy(a_y, gap, total, inverse, squares, error_factor, KIND, BELOW_ONE)
    kl += _kl_of_sum(t, b_y, b_label, prior_sum, p_table, official, K, BELOW_ONE)
    weight = tl.where(counted, _weight(p_table, b_label, K), 0.0)

    columns = 4 + 3 * K
    if GRADIENT != 0:
        columns += 8
    s_column = tl.num_programs(0).to(tl.int64)
    p_out = p_partial + i_image * columns * s_column + i_program
    tl.store(p_out, tl.sum(tl.where(counted, 1.0, 0.0)).to(tl.float64))
    tl.store(p_out + s_column, tl.sum(weight).to(tl.float64))
    tl.store(p_out + 2 * s_column, tl.sum(tl.where(counted, weight * ace, 0.0)).to(tl.float64))
    tl.store(p_out + 3 * s_column, tl.sum(tl.where(counted, weight * kl, 0.0)).to(tl.float64))
    p_out += 4 * s_column
    counted_inverse = tl.where(counted, inverse, 0.0)
    for c in range(0, K):
        e = special.evidence(_load_logit(p_z + c * s_class, o_voxel * s_voxel, m, counted, 0.0, False), EVIDENCE)
        is_y = b_label == c
        p = (e + tl.load(p_table + c)) * counted_inverse
        p_class = p_out + c * s_column
        tl.store(p_class, tl.sum(tl.where(is_y, p, 0.0)).to(tl.float64))
        tl.store(p_class + K * s_column, tl.sum(p).to(tl.float64))
        tl.store(p_class + 2 * K * s_column, tl.sum(tl.where(is_y, 1.0, 0.0)).to(tl.float64))
    if GRADIENT != 0:
        b_band = tl.load(p_band + o_first + o_voxel, mask=m, other=0)
        on = counted & (b_band == _BOUNDARY)
        g = tl.load(p_image + o_first + o_voxel, mask=on, other=0.0).to(tl.float32)
        zero = tl.zeros([BLOCK], tl.float32)
        moments = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
        moments = _add_moments(moments, b_band, counted, inverse, g)
        n, g0, r0, sg, sr = moments[0], moments[1], moments[2], moments[3], moments[4]
        number, g_sum, r_sum, far_n, far_r = _sums((n, n * g0 + sg, n * r0 + sr, moments[8], moments[9]), 5)
        _store_moments(p_out + 3 * K * s_column, s_column, moments, number, g_sum, r_sum, far_n, far_r, prior_sum)


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(p_partial, p_sums, programs, BLOCK: tl.constexpr):
    """One sum of one image a program: a row of p_partial (rows, programs), added in a fixed order, float64."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        acc += tl.load(p_partial + i_row * programs + start + o, mask=start + o < programs, other=0.0)
    tl.store(p_sums + i_row, tl.sum(acc))


@triton.jit
def _dice(tp, p, present, number, ADAPTIVE: tl.constexpr):
    """D_k, dD_k/dTP_k and dD_k/dP_k of the sums of a class, float64."""
    if ADAPTIVE:
        tp += p * _SMOOTH_TARGET
        fp = p - tp
        fn = present + number * _SMOOTH_TARGET - tp
        total = fp + fn + _TVERSKY_EPS
        ratio = fp / total
        balance = tl.where(ratio < 0.2, 0.2, tl.where(ratio > 0.8, 0.8, ratio))
        inside = tl.where((ratio >= 0.2) & (ratio <= 0.8), 1.0, 0.0)
        denominator = tp + balance * fp + (1.0 - balance) * fn + _TVERSKY_EPS
        d = tp / denominator
        # Through TP (which lowers FP and FN alike) and through P (which raises FP).
        balance_tp = inside * (fp - fn - _TVERSKY_EPS) / (total * total)
        balance_p = inside * (fn + _TVERSKY_EPS) / (total * total)
        d_tp = (1.0 - d * balance_tp * (fp - fn)) / denominator
        d_p = -d * (balance_p * (fp - fn) + balance) / denominator
        return d, d_tp, d_p + d_tp * _SMOOTH_TARGET
    else:
        denominator = p + present + _SOFT_DICE_EPS
        d = (2.0 * tp + _SOFT_DICE_EPS) / denominator
        return d, 2.0 / denominator, -d / denominator


@triton.jit
def sum_column(p_sums, images, s_row, ROWS: tl.constexpr):
    """Sum of a column over the images."""
    acc = tl.zeros([ROWS], tl.float64)
    for start in range(0, images, ROWS):
        o_row = start + tl.arange(0, ROWS)
        acc += tl.load(p_sums + o_row.to(tl.int64) * s_row, mask=o_row < images, other=0.0)
    return tl.sum(acc)


@triton.jit
def _sum_classes(p_sums, images, s_row, K: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr):
    """Sums of K columns over the images, [CLASSES]."""
    o_class = tl.arange(0, CLASSES)
    acc = tl.zeros([CLASSES], tl.float64)
    for start in range(0, images, ROWS):
        o_row = start + tl.arange(0, ROWS)
        m = (o_row < images)[:, None] & (o_class < K)[None, :]
        tile = tl.load(p_sums + o_row.to(tl.int64)[:, None] * s_row + o_class[None, :], mask=m, other=0.0)
        acc += tl.sum(tile, 0)
    return acc


@triton.jit
def finalised(
    p_sums, p_table, images, w_ace, w_kl, w_dice, K: tl.constexpr, COLUMNS: tl.constexpr, ADAPTIVE: tl.constexpr,
    BACKGROUND: tl.constexpr, WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(ACE, KL, Dice loss, coefficients of ACE and KL, of TP_k and P_k [CLASSES]) of all images, float64."""
    o_class = tl.arange(0, CLASSES)  # [CLASSES]
    number = sum_column(p_sums, images, COLUMNS, ROWS)
    weight_sum = sum_column(p_sums + 1, images, COLUMNS, ROWS)
    scale = tl.where(weight_sum > 0.0, 1.0 / tl.where(weight_sum > 0.0, weight_sum, 1.0), 0.0)
    ace = sum_column(p_sums + 2, images, COLUMNS, ROWS) * scale
    kl = sum_column(p_sums + 3, images, COLUMNS, ROWS) * scale

    tp = _sum_classes(p_sums + 4, images, COLUMNS, K, CLASSES, ROWS)
    p = _sum_classes(p_sums + 4 + K, images, COLUMNS, K, CLASSES, ROWS)
    present = _sum_classes(p_sums + 4 + 2 * K, images, COLUMNS, K, CLASSES, ROWS)
    d, d_tp, d_p = _dice(tp, p, present, number, ADAPTIVE)
    m_share = o_class < K
    if not BACKGROUND:
        m_share = m_share & (o_class > 0)
    share = tl.where(m_share, 1.0, 0.0).to(tl.float64)
    if WEIGHTED:
        share *= tl.load(p_table + 2 * K + o_class, mask=m_share, other=0.0).to(tl.float64)
    share_sum = tl.sum(share)
    share = tl.where((number > 0.0) & (share_sum > 0.0), share / tl.where(share_sum > 0.0, share_sum, 1.0), 0.0)
    dice = tl.sum(share * (1.0 - d))
    return ace, kl, dice, w_ace * scale, w_kl * scale, -w_dice * share * d_tp, -w_dice * share * d_p


@triton.jit
def store_coefficients(p_row, c_ace, c_kl, c_tp, c_p, K: tl.constexpr, CLASSES: tl.constexpr):
    o_class = tl.arange(0, CLASSES)
    tl.store(p_row, c_ace.to(tl.float32))
    tl.store(p_row + 1, c_kl.to(tl.float32))
    tl.store(p_row + 2 + o_class, c_tp.to(tl.float32), mask=o_class < K)
    tl.store(p_row + 2 + K + o_class, c_p.to(tl.float32), mask=o_class < K)


@triton.jit(do_not_specialize=["images"])
def finalise_kernel(
    p_sums, p_table, p_loss, p_terms, p_coefficients,
    images,
    w_ace, w_kl, w_dice,
    K: tl.constexpr, ADAPTIVE: tl.constexpr, BACKGROUND: tl.constexpr, WEIGHTED: tl.constexpr,
    CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Loss, terms (3,) and one row of coefficients from the sums (images, 4 + 3 K): `closed_form.finalise`.

    One program, float64 inside, float32 out: at small sizes launches cost more than the sweeps.
    """
    ace, kl, dice, c_ace, c_kl, c_tp, c_p = finalised(
        p_sums, p_table, images, w_ace, w_kl, w_dice, K, 4 + 3 * K, ADAPTIVE, BACKGROUND, WEIGHTED, CLASSES, ROWS
    )
    tl.store(p_loss, (w_ace * ace + w_kl * kl + w_dice * dice).to(tl.float32))
    tl.store(p_terms, ace.to(tl.float32))
    tl.store(p_terms + 1, kl.to(tl.float32))
    tl.store(p_terms + 2, dice.to(tl.float32))
    store_coefficients(p_coefficients, c_ace, c_kl, c_tp, c_p, K, CLASSES)


@triton.jit(do_not_specialize=["depth", "march", "channels", "D", "H", "W", "ignore_index"])
def gradient_kernel(
    p_z, p_label, p_mask, p_band, p_image, p_table, p_coefficients, p_means, p_up, p_dz,
    voxels, plane, depth, march, channels, D, H, W,
    s_image, s_class, s_voxel, s_dz_image, s_dz_class, s_dz_voxel, s_coefficients,
    ignore_index, prior_sum, error_factor, official, scale_d, scale_h, scale_w,
    K: tl.constexpr, KIND: tl.constexpr, EVIDENCE: tl.constexpr, UNIT_PRIOR: tl.constexpr, BELOW_ONE: tl.constexpr,
    WEIGHTED: tl.constexpr, HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, DIMS: tl.constexpr,
    CENTRE: tl.constexpr, PADDING: tl.constexpr, REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dz of every voxel, 0 where it does not count: there the logit read is one without evidence or slope.

    Coefficients are float32 and scaled by *p_up in here.
    """
    i_program = tl.program_id(0)
    i_image = tl.program_id(1).to(tl.int64)
    s_class, s_voxel = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    s_dz_class, s_dz_voxel = tl.cast(s_dz_class, tl.int64), tl.cast(s_dz_voxel, tl.int64)
    voxels = tl.cast(voxels, tl.int64)
    WHOLE: tl.constexpr = GRADIENT >= 2
    start, z_first, z_end = _program(i_program, plane, depth, march, BLOCK)
    o_plane, m_plane = _lanes(start, plane, BLOCK, WHOLE)
    p_z += i_image * s_image
    p_dz += i_image * s_dz_image
    p_label += i_image * voxels
    p_mask += i_image * voxels
    p_band += i_image * voxels
    p_image += i_image * channels * voxels
    p_coefficients += i_image * s_coefficients

    # Where dL/dz is rounded to 16 bits, the last bits of the evidence's slope do not matter.
    NARROW: tl.constexpr = p_dz.dtype.element_ty != tl.float32
    up = tl.load(p_up).to(tl.float32)
    c_ace = tl.load(p_coefficients) * up
    c_kl = tl.load(p_coefficients + 1) * up
    c_p, c_tps, prior, c_p_prior = (), (), (), 0.0
    for c in tl.static_range(K):
        if K <= _FEW_CLASSES:
            c_tps += (tl.load(p_coefficients + 2 + c) * up,)
        c_p += (tl.load(p_coefficients + 2 + K + c) * up,)
        if UNIT_PRIOR:
            prior += (1.0,)
        else:
            prior += (tl.load(p_table + c),)
        c_p_prior += c_p[c] * prior[c]
    if GRADIENT != 0:
        supervision = _load_supervision(p_coefficients + 2 + 2 * K, p_means + 2 * i_image, up * prior_sum)
    if GRADIENT >= 2:
        o_h, o_w = taps.plane_position(start, W, BLOCK)
    if GRADIENT == 2:
        planes = taps.first_planes(p_image, z_first, o_h, o_w, D, H, W, plane, W, 1, CENTRE, PADDING)
    o_first = tl.cast(z_first, tl.int64) * plane
    p_march, ahead = p_image + o_first, 0

    for z in range(z_first, z_end):
        step = _step(z, depth, plane, GRADIENT, PADDING)
        if GRADIENT == 2:
            ahead += tl.cast(step, tl.int32)
        o_voxel = o_first + o_plane
        m = m_plane
        if not WHOLE:
            m = o_plane < tl.minimum(voxels - o_first, plane).to(tl.int32)
        b_label, counted = _load_label(p_label, p_mask, o_voxel, m, ignore_index, HAS_MASK, WHOLE)
        # First of all, while few registers are taken.
        if GRADIENT != 0:
            b_band = _load(p_band + o_voxel, m, WHOLE)
            on = counted & (b_band == _BOUNDARY)
            if GRADIENT == 1:
                g = tl.load(p_image + o_voxel, mask=on, other=0.0).to(tl.float32)
            elif GRADIENT == 2:
                g, planes = _marched(
                    planes, p_march, ahead, z, o_plane, o_h, o_w, D, H, W, scale_d, scale_h, scale_w, CENTRE, PADDING
                )
            else:
                g = _filtered(
                    p_image, z, o_h, o_w, channels, voxels, plane, D, H, W, scale_d, scale_h, scale_w,
                    DIMS, CENTRE, PADDING, REDUCTION,
                )  # fmt: skip
        w_ace, w_kl = c_ace, c_kl
        if WEIGHTED:
            weight = _weight(p_table, b_label, K)
            w_ace, w_kl = c_ace * weight, c_kl * weight

        # 1. What belongs to one class alone: the slope of its KL term or of psi(a_y), and that of the evidence.
        e_y = tl.zeros([BLOCK], tl.float32)
        t, squares = e_y, e_y
        dp_a = e_y + c_p_prior
        c_tp = e_y
        slopes, class_slopes, concentrations = (), (), ()
        for c in tl.static_range(K):
            logit = _load_logit(p_z + c * s_class, o_voxel * s_voxel, m, counted, _NO_EVIDENCE, WHOLE)
            e = special.evidence(logit, EVIDENCE)
            slopes += (special.evidence_slope(logit, e, EVIDENCE, NARROW),)
            is_y = b_label == c
            if K <= _FEW_CLASSES:
                c_tp = tl.where(is_y, c_tps[c], c_tp)
            if c == 0:
                e_y = tl.where(is_y, e, 0.0)
                t = tl.where(is_y, 0.0, e)
            else:
                e_y = tl.where(is_y, e, e_y)
                t = tl.where(is_y, t, t + e)
            dp_a += c_p[c] * e
            class_slopes += (_class_slope(e, prior[c], is_y, KIND, BELOW_ONE),)
            if KIND == "mse":
                concentrations += (e + prior[c],)
                squares = tl.where(is_y, squares, squares + concentrations[c] * concentrations[c])

        # 2. What all classes share, and what the true or the wrong ones do.
        b_y, excess = tl.full([BLOCK], 1.0, tl.float32), t
        if not UNIT_PRIOR:
            b_y = _own(p_table, b_label, K)
            excess += official * (1.0 - b_y)
        a_y = e_y + b_y
        gap = t + (prior_sum - b_y)
        total = a_y + gap
        inverse = special.reciprocal(total)
        if K > _FEW_CLASSES:
            c_tp = _own(p_coefficients + 2, b_label, K) * up
        dp_a += c_tp * a_y
        if GRADIENT != 0:
            dp_a += _supervised_slope(supervision, on, b_band, prior_sum * inverse, g)
        da_own, da_wrong, per_a = _slopes(
            a_y, gap, total, inverse, squares, excess, dp_a, c_tp,
            w_ace, w_kl, prior_sum, error_factor, KIND, BELOW_ONE,
        )  # fmt: skip

        # 3. Through the evidence, every element written.
        b_again = b_label
        if GRADIENT == 2 and K > _FEW_PREDICATES:
            # Plus 0, which the compiler does not know: the label is compared again, not K answers kept and unpacked.
            b_again += march >> 31
        for c in tl.static_range(K):
            is_y = b_again == c
            da_rest = da_wrong
            if KIND == "mse":
                da_rest += per_a * concentrations[c]
            da = _class_da(class_slopes[c], is_y, da_own, da_rest, w_ace, w_kl, KIND) + c_p[c] * inverse
            dz = slopes[c] * da
            tl.store(p_dz + c * s_dz_class + o_voxel * s_dz_voxel, dz.to(p_dz.dtype.element_ty), mask=m)
        o_first += step


@triton.jit(do_not_specialize=["K", "ignore_index"])
def many_gradient_kernel(
    p_z, p_label, p_mask, p_band, p_image, p_table, p_coefficients, p_means, p_up, p_dz,
    voxels, K,
    s_image, s_class, s_voxel, s_dz_image, s_dz_class, s_dz_voxel, s_coefficients,
    ignore_index, prior_sum, error_factor, official,
    KIND: tl.constexpr, EVIDENCE: tl.constexpr, BELOW_ONE: tl.constexpr, HAS_MASK: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`gradient_kernel` with a loop over the classes, twice."""
    i_image = tl.program_id(1).to(tl.int64)
    K, voxels = tl.cast(K, tl.int64), tl.cast(voxels, tl.int64)
    s_class, s_voxel = tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    s_dz_class, s_dz_voxel = tl.cast(s_dz_class, tl.int64), tl.cast(s_dz_voxel, tl.int64)
    o_voxel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o_voxel < voxels
    p_z += i_image * s_image
    p_dz += i_image * s_dz_image
    p_coefficients += i_image * s_coefficients
    o_first = i_image * voxels
    b_label, counted = _load_label(p_label + o_first, p_mask + o_first, o_voxel, m, ignore_index, HAS_MASK, False)
    up = tl.load(p_up).to(tl.float32)
    weight = _weight(p_table, b_label, K)
    w_ace, w_kl = tl.load(p_coefficients) * up * weight, tl.load(p_coefficients + 1) * up * weight

    e_y = tl.zeros([BLOCK], tl.float32)
    t, squares, dp_a = e_y, e_y, e_y
    for c in range(0, K):
        e = special.evidence(
            _load_logit(p_z + c * s_class, o_voxel * s_voxel, m, counted, _NO_EVIDENCE, False), EVIDENCE
        )
        is_y = b_label == c
        a = e + tl.load(p_table + c)
        e_y = tl.where(is_y, e, e_y)
        t = tl.where(is_y, t, t + e)
        squares = tl.where(is_y, squares, squares + a * a)
        dp_a += tl.load(p_coefficients + 2 + K + c) * up * a
    b_y = _own(p_table, b_label, K)
    a_y = e_y + b_y
    gap = t + (prior_sum - b_y)
    total = a_y + gap
    inverse = special.reciprocal(total)
    c_tp = _own(p_coefficients + 2, b_label, K) * up
    dp_a += c_tp * a_y
    if GRADIENT != 0:
        b_band = tl.load(p_band + o_first + o_voxel, mask=m, other=0)
        on = counted & (b_band == _BOUNDARY)
        g = tl.load(p_image + o_first + o_voxel, mask=on, other=0.0).to(tl.float32)
        supervision = _load_supervision(p_coefficients + 2 + 2 * K, p_means + 2 * i_image, up * prior_sum)
        dp_a += _supervised_slope(supervision, on, b_band, prior_sum * inverse, g)
    da_own, da_wrong, per_a = _slopes(
        a_y, gap, total, inverse, squares, t + official * (1.0 - b_y), dp_a, c_tp,
        w_ace, w_kl, prior_sum, error_factor, KIND, BELOW_ONE,
    )  # fmt: skip

    for c in range(0, K):
        logit = _load_logit(p_z + c * s_class, o_voxel * s_voxel, m, counted, _NO_EVIDENCE, False)
        e = special.evidence(logit, EVIDENCE)
        is_y = b_label == c
        b = tl.load(p_table + c)
        a = e + b
        slope = _class_slope(e, b, is_y, KIND, BELOW_ONE)
        da = _class_da(slope, is_y, da_own, da_wrong + per_a * a, w_ace, w_kl, KIND)
        da += tl.load(p_coefficients + 2 + K + c) * up * inverse
        dz = special.evidence_slope(logit, e, EVIDENCE) * da
        tl.store(p_dz + c * s_dz_class + o_voxel * s_dz_voxel, dz.to(p_dz.dtype.element_ty), mask=m)


# Classes up to which the sweeps are unrolled over them; beyond, they loop.
MOST_UNROLLED = 32
_MANY_BLOCK = 256
# Steps of a program on large volumes, and how many programs keep a GPU busy.
_STEPS, _ENOUGH_PROGRAMS = 32, 2048
# From here on programs are enough for marches twice as far: what one does before and after is worth some planes.
_VERY_LARGE_VOLUME = 1 << 27
# Elements of an image that a march reaches, from its first plane on.
_MARCH_INDICES = 1 << 31
_REDUCE_BLOCK = 1024
_FINALISE_ROWS, _FINALISE_WARPS = 16, 1
NUM_WARPS = 4


# Operator, spacing, padding mode and channel reduction.
Filter = tuple[str, tuple[float, ...], str, str]


class Source(NamedTuple):
    """What the supervised loss reads besides: the image and its filter, or where `cached` the gradient magnitude as
    `image`."""

    band: Tensor
    image: Tensor
    filter: Filter
    cached: bool


def block_size(k: int, gradient: int) -> int:
    """Voxels of a program at a time: two a thread, one where many classes or the filter's planes take registers."""
    return 256 if k <= 8 and gradient <= CACHED else 128


# As good as for ever: graphs that were captured read a table's memory when they are replayed.
@functools.lru_cache(maxsize=4096)
def table(formula: Formula, device: torch.device) -> Tensor:
    """Prior, lgamma(prior), class weights, then what `kl_share` reads of the priors and of their sum; float32.

    (6, K) and three more, flat; kept on the device from call to call.
    """
    *prior, total = (concentration(b, formula.below_one) for b in (*formula.prior, math.fsum(formula.prior)))
    value, lgamma, *shares = zip(*prior, strict=True)
    rows = (value, lgamma, formula.class_weight or [1.0] * formula.k, *shares, total[2:])
    return torch.tensor([x for row in rows for x in row], dtype=torch.float32, device=device)


def _inputs(
    logits: Tensor, target: Tensor, mask: Tensor | None, formula: Formula, source: Source | None
) -> tuple[tuple[Tensor, ...], Filter | None]:
    """The tensors that both sweeps read, logits flattened first, and the filter that they are left to apply."""
    # A view where the spatial axes are evenly spaced, else a contiguous copy.
    z = flat(logits)
    band, image, filter_ = z, z, None
    if source is not None:
        band, image = source.band.contiguous(), source.image.contiguous()
        if not source.cached and z.shape[1] > MOST_UNROLLED:
            image = gradient_magnitude.forward(image, *source.filter, 0.0)
        elif not source.cached:
            filter_ = source.filter
    labels = target.contiguous()
    counted = z if mask is None else mask.contiguous().view(torch.uint8)
    return (z, labels, counted, band, image, table(formula, logits.device)), filter_


@planned
def _launch(
    backward: bool,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    formula: Formula,
    masked: bool,
    ignore_index: int,
    supervised: bool,
    filter_: Filter | None,
    channels: int,
    device: torch.device,
) -> Launch:
    """A sweep over logits of this shape; `strides` are those of the flattened logits, of dz, and of coefficients.

    `channels` are the image's, where it is filtered.
    """
    n, k, *spatial = shape
    voxels = math.prod(spatial)
    gradient = CACHED if supervised else NO_GRADIENT
    prior_sum = math.fsum(formula.prior)
    scalars = (ignore_index, prior_sum, float(k if formula.official else 1), float(formula.official))
    options: dict[str, Any] = {
        "KIND": formula.kind,
        "EVIDENCE": formula.evidence,
        "BELOW_ONE": formula.below_one,
        "HAS_MASK": masked,
        "num_warps": warps_on(NUM_WARPS, device),
    }
    if k > MOST_UNROLLED:
        options |= {"GRADIENT": gradient, "BLOCK": _MANY_BLOCK}
        many = many_gradient_kernel if backward else many_sums_kernel
        return Launch(many, (cdiv(voxels, _MANY_BLOCK), n), (voxels, k, *strides, *scalars), options)

    depth, height, width = (1, *spatial) if len(spatial) == 2 else spatial
    dims, scales, centre, padding, reduction = 3, (0.0, 0.0, 0.0), 0.0, "replicate", "l2"
    if filter_ is not None:
        operator, spacing, padding, reduction = filter_
        scales, centre = axis_scales(operator, spacing), centre_tap(operator)
        gradient, dims = FILTERED, len(spatial)
        # A march has indices of 32 bits.
        if channels == 1 and dims == 3 and height * width < _MARCH_INDICES // 4:
            gradient, reduction = MARCHED, "l2"
    block = block_size(k, gradient)
    if filter_ is not None:
        plane, planes, march = height * width, depth, march_length(n * voxels, depth)
        if n * voxels >= _VERY_LARGE_VOLUME:
            march = min(depth, 2 * march)
        if gradient == MARCHED:
            # With the plane after the last, and an index within it.
            march = min(march, _MARCH_INDICES // plane - 2)
    else:
        plane, planes = block, cdiv(voxels, block)
        march = min(_STEPS, cdiv(n * planes, _ENOUGH_PROGRAMS))
    options |= {
        "K": k,
        "UNIT_PRIOR": set(formula.prior) == {1.0},
        "WEIGHTED": bool(formula.class_weight),
        "GRADIENT": gradient,
        "DIMS": dims,
        "CENTRE": centre,
        "PADDING": padding,
        "REDUCTION": reduction,
        "BLOCK": block,
    }
    sizes = (voxels, plane, planes, march, channels, depth, height, width)
    kernel = gradient_kernel if backward else sums_kernel
    return Launch(kernel, (cdiv(plane, block) * cdiv(planes, march), n), (*sizes, *strides, *scalars, *scales), options)


@planned
def _reduction(rows: int, programs: int, device: torch.device) -> Launch:
    options = {"BLOCK": _REDUCE_BLOCK, "num_warps": warps_on(NUM_WARPS, device)}
    return Launch(reduce_kernel, (rows,), (programs,), options)


def sums(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    formula: Formula,
    source: Source | None = None,
) -> Tensor:
    """Sums of each image, (N, number_of_sums) float64. `target` and `mask` are (N, *spatial)."""
    inputs, filter_ = _inputs(logits, target, mask, formula, source)
    supervised, device, n = source is not None, logits.device, logits.shape[0]
    channels = 1 if filter_ is None else inputs[4].shape[1]
    options = (formula, mask is not None, ignore_index, supervised, filter_, channels, device)
    sweep = _launch(False, logits.shape, inputs[0].stride(), *options)
    columns, programs = number_of_sums(formula.k, supervised), sweep.grid[0]
    partial = torch.empty((n, columns, programs), dtype=torch.float64, device=device)
    result = torch.empty((n, columns), dtype=torch.float64, device=device)
    with torch.cuda.device_of(logits):
        sweep(*inputs, partial)
        _reduction(n * columns, programs, device)(partial, result)
    return result


def gradient(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    coefficients: Tensor,
    means: Tensor | None,
    upstream: Tensor,
    formula: Formula,
    source: Source | None = None,
) -> Tensor:
    """dL/dz in the logits' dtype and `gradient_format`.

    `coefficients` is (N, number_of_coefficients) float32, or one row for all images; `upstream` the 0-d gradient of
    the loss, which multiplies them on the device; `means` (N, 2) float32 where supervised.
    """
    inputs, filter_ = _inputs(logits, target, mask, formula, source)
    channels = 1 if filter_ is None else inputs[4].shape[1]
    result = torch.empty_like(logits, memory_format=gradient_format(logits))
    out = flat(result)
    strides = (*inputs[0].stride(), *out.stride(), coefficients.stride(0) if len(coefficients) > 1 else 0)
    options = (formula, mask is not None, ignore_index, source is not None, filter_, channels, logits.device)
    sweep = _launch(True, logits.shape, strides, *options)
    with torch.cuda.device_of(logits):
        sweep(*inputs, coefficients, coefficients if means is None else means, upstream, out)
    return result


class Finalised(NamedTuple):
    """Loss (), terms (3,) and the row of coefficients (1, number_of_coefficients), float32."""

    loss: Tensor
    terms: Tensor
    coefficients: Tensor


def finalise_options(formula: Formula, dice_form: str, include_background: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernels that finalise."""
    return {
        "K": formula.k,
        "ADAPTIVE": dice_form == "adaptive_tversky",
        "BACKGROUND": include_background,
        "WEIGHTED": bool(formula.class_weight),
        "CLASSES": triton.next_power_of_2(formula.k),
        "ROWS": _FINALISE_ROWS,
        "num_warps": _FINALISE_WARPS,
    }


@planned
def _finaliser(images: int, formula: Formula, dice_form: str, include_background: bool, device: torch.device) -> Launch:
    """Without the weights of the terms, which may change at every step."""
    options = finalise_options(formula, dice_form, include_background)
    return Launch(finalise_kernel, (1,), (images, *(0.0,) * 3), options)


def finalise(sums: Tensor, formula: Formula, weights: Weights) -> Finalised:
    """`closed_form.finalise` in one launch, for the sums (N, number_of_sums) of one process."""
    device = sums.device
    out = Finalised(
        torch.empty((), dtype=torch.float32, device=device),
        torch.empty(3, dtype=torch.float32, device=device),
        torch.empty((1, number_of_coefficients(formula.k, supervised=False)), dtype=torch.float32, device=device),
    )
    n, numbers = len(sums), (weights.ace, weights.kl, weights.dice)
    launch = _finaliser(n, formula, weights.dice_form, weights.include_background, device)
    with torch.cuda.device_of(sums):
        launch(sums, table(formula, device), *out, numbers=(n, *numbers))
    return out


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`; flags that a mode ignores vary with it."""
    formula_flags: dict[str, tuple[Any, ...]] = {
        "kind": ("digamma", "log", "mse"),
        "evidence": EVIDENCE,
        "prior": ("unit", "above_one", "below_one"),
        "mask": (False, True),
        "dtype": ("float32", "bfloat16", "float16"),
        "image": ("float32", "bfloat16", "float16"),
        "labels": ("u8", "i8", "i16", "i32", "i64"),
        "contiguous": (True, False),
    }
    unrolled = formula_flags | {
        "K": tuple(range(2, MOST_UNROLLED + 1)),
        "weighted": (False, True),
        "gradient": ("none", "cached", "marched", "filtered 2D", "filtered 3D"),
        "operator": OPERATORS,
        "padding": PADDING_MODES,
        "reduction": CHANNEL_REDUCTIONS,
    }
    looped = formula_flags | {"gradient": ("none", "cached")}
    modes = {"none": NO_GRADIENT, "cached": CACHED, "marched": MARCHED}

    def arguments(kernel: Any, f: Flags) -> Arguments:
        pointer = pointer_type(f["dtype"])
        types = {name: "*fp32" for name in kernel.arg_names if name.startswith("p_")}
        types |= {"p_z": pointer, "p_dz": pointer, "p_label": f"*{f['labels']}", "p_mask": "*u8", "p_band": "*u8"}
        types |= {"p_partial": "*fp64", "p_image": pointer_type(f["image"])}
        types |= {name: "int" for name in kernel.arg_names if name.startswith("s_")}
        types |= dict.fromkeys(("K", "plane", "depth", "march", "channels", "D", "H", "W"), "i32")
        types |= dict.fromkeys(("voxels", "ignore_index"), "int")
        floats = ("prior_sum", "error_factor", "official", "scale_d", "scale_h", "scale_w")
        types |= dict.fromkeys(floats, "fp32")
        gradient = modes.get(f["gradient"], FILTERED)
        constants = {
            "KIND": f["kind"],
            "EVIDENCE": f["evidence"],
            "BELOW_ONE": f["prior"] == "below_one",
            "HAS_MASK": f["mask"],
            "GRADIENT": gradient,
            "BLOCK": block_size(f["K"], gradient) if "K" in f else _MANY_BLOCK,
        }
        if "K" in f:
            constants |= {
                "K": f["K"],
                "UNIT_PRIOR": f["prior"] == "unit",
                "WEIGHTED": f["weighted"],
                "DIMS": 2 if f["gradient"] == "filtered 2D" else 3,
                "CENTRE": centre_tap(f["operator"]),
                "PADDING": f["padding"],
                "REDUCTION": f["reduction"],
            }
        if f["contiguous"]:
            constants |= {name: 1 for name in ("s_voxel", "s_dz_voxel") if name in kernel.arg_names}
        return Arguments(types, constants, NUM_WARPS)

    def finalise(f: Flags) -> Arguments:
        types = dict.fromkeys(finalise_kernel.arg_names, "fp32") | {"images": "i32", "p_sums": "*fp64"}
        types |= dict.fromkeys(("p_table", "p_loss", "p_terms", "p_coefficients"), "*fp32")
        return Arguments(types, finalise_constants(f), _FINALISE_WARPS)

    def reduce(f: Flags) -> Arguments:
        types = {"p_partial": "*fp64", "p_sums": "*fp64", "programs": "i32"}
        return Arguments(types, {"BLOCK": _REDUCE_BLOCK}, NUM_WARPS)

    sweeps = (
        (sums_kernel, "forward", unrolled, 0),
        (gradient_kernel, "backward", unrolled, 0),
        (many_sums_kernel, "forward", looped, MOST_UNROLLED + 1),
        (many_gradient_kernel, "backward", looped, MOST_UNROLLED + 1),
    )
    cases = [
        KernelCases(
            kernel,
            "evidential_loss",
            direction,
            flags,
            functools.partial(arguments, kernel),
            fewest_classes=fewest,
        )
        for kernel, direction, flags, fewest in sweeps
    ]
    return [
        *cases,
        KernelCases(reduce_kernel, "evidential_loss", "forward", {}, reduce),
        KernelCases(finalise_kernel, "evidential_loss", "forward", finalise_flags(), finalise),
    ]


def finalise_flags() -> dict[str, tuple[Any, ...]]:
    """Flags of the kernels that finalise, for which 64 and 150 classes stand for all beyond the sweeps'."""
    return {
        "K": (*range(2, MOST_UNROLLED + 1), 64, 150),
        **dict.fromkeys(("adaptive", "background", "weighted"), (False, True)),
    }


def finalise_constants(f: Flags) -> dict[str, Any]:
    """Compile-time arguments of the kernels that finalise, from their flags."""
    return {
        "K": f["K"],
        "ADAPTIVE": f["adaptive"],
        "BACKGROUND": f["background"],
        "WEIGHTED": f["weighted"],
        "CLASSES": triton.next_power_of_2(f["K"]),
        "ROWS": _FINALISE_ROWS,
    }
