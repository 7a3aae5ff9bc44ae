"""Dirichlet measures and their gradient on the GPU: the formulas of `closed_form`, one pass over the logits each.

With a = e + b, S = sum a, p = a / S, B = sum b, psi the digamma function, h(x, c) = (x - c) psi(x) - lgamma(x) -
(x - c) and delta(x) = psi(x + 1) - ln x:

    vacuity              = B / S
    entropy              = -sum p ln p
    expected entropy     = sum p (psi(S + 1) - psi(a + 1))
    mutual information   = sum p delta(a) - delta(S)
    differential entropy = h(S, K) - sum h(a, 1)
    dissonance           = 1 / S sum_{i < j} m(e_i, e_j) (1 / d_i + 1 / d_j)

    m(x, y) = 2 x y min(x, y) / (x + y),   d_k = sum_{j != k} e_j = E - e_k, or the sum of the others for the largest

(Jøsang, Cho, Chen, FUSION 2018, for the dissonance.) Gradients with respect to p reach a through
dL/da_k = (dL/dp_k - sum_j p_j dL/dp_j) / S.

FLAGS says which measures are asked for; what belongs to the others is neither computed nor stored. Up to MOST_STATIC
classes (MOST_STATIC_PAIRS for the dissonance) are held in registers and their loops unrolled. Beyond, compiling would
take a minute and more, and the `wide` kernels loop at run time: each loop reads the logits again, from cache.

Instructions a voxel, K = 4, bfloat16, softplus, sm_90: 105 forward and 189 backward for probability and vacuity, 228
and 328 for vacuity, entropy and mutual information, 683 and 889 for every measure. Bytes: the logits once, 4 for each
number of the measures, backward the gradient as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sure_kernels.compile_check.cases import Arguments, Flags, KernelCases, pointer_type
from sure_kernels.kernel_lib import device_special as special
from sure_kernels.kernel_lib.chunks import flat
from sure_kernels.kernel_lib.launch import Launch, cdiv, gradient_format, planned, warps_on
from sure_kernels.kernel_lib.special import EVIDENCE
from sure_kernels.ops.dirichlet.reference import MEASURES

_BITS = {name: 1 << i for i, name in enumerate(MEASURES)}
_PROBABILITY = tl.constexpr(_BITS["probability"])
_VACUITY = tl.constexpr(_BITS["vacuity"])
_ENTROPY = tl.constexpr(_BITS["entropy"])
_EXPECTED = tl.constexpr(_BITS["expected_entropy"])
_MUTUAL = tl.constexpr(_BITS["mutual_information"])
_DIFFERENTIAL = tl.constexpr(_BITS["differential_entropy"])
_DISSONANCE = tl.constexpr(_BITS["dissonance"])
# Measures whose gradient goes through p.
_THROUGH_P = tl.constexpr(sum(_BITS[m] for m in ("probability", "entropy", "expected_entropy", "mutual_information")))
# The smallest normal float32: keeps 0 / 0 at 0.
_TINY = tl.constexpr(2.0**-126)

MOST_STATIC, MOST_STATIC_PAIRS = 16, 8
NUM_WARPS = 4


@triton.jit
def _block(BLOCK: tl.constexpr):
    """(image, first voxel) of this program, int64."""
    return tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK


@triton.jit
def _load_logit(p_logits, c, o_logit, s_class, m):
    return tl.load(p_logits + c * s_class + o_logit, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _load_prior(p_prior, c, UNIT_PRIOR: tl.constexpr):
    if UNIT_PRIOR:
        return 1.0
    else:
        return tl.load(p_prior + c)


@triton.jit
def _digamma_next(x):
    """(t, polynomial) of digamma(x + 1) = polynomial - ln t."""
    t = special.reciprocal(x + special.SHIFT_NEXT)
    return t, special.digamma_polynomial(t)


@triton.jit
def _digamma_gap(a, s, polynomial_s):
    """psi(S + 1) - psi(a + 1), given the polynomial of psi(S + 1)."""
    t, polynomial = _digamma_next(a)
    return special.ln1p((s - a) * t) + (polynomial_s - polynomial)


@triton.jit
def _class_terms(
    a, p, s, polynomial_s, entropy, expected, mutual, differential, FLAGS: tl.constexpr, BELOW_ONE: tl.constexpr
):
    """The four sums over classes with one class added."""
    if _ENTROPY & FLAGS:
        entropy -= p * special.ln(p)
    if _EXPECTED & FLAGS:
        expected += p * _digamma_gap(a, s, polynomial_s)
    if _MUTUAL & FLAGS:
        mutual += p * special.digamma_excess(a, BELOW_ONE)
    if _DIFFERENTIAL & FLAGS:
        if BELOW_ONE:
            differential -= special.kl_term(a, 1.0, True)
        else:
            y = a + special.SHIFT
            differential += 0.5 * special.ln(y) - special.kl_term_one_polynomial(special.reciprocal_fast(y))
    return entropy, expected, mutual, differential


@triton.jit
def _largest(e, c, total_others, e_largest, i_largest):
    """The largest evidence so far, its class and the sum of the others, with class c added."""
    larger = e > e_largest
    total_others += tl.where(larger, e_largest, e)
    return total_others, tl.where(larger, e, e_largest), tl.where(larger, c, i_largest)


@triton.jit
def _inverse_others(e, c, total_others, e_largest, i_largest):
    """1 / d_c, and 0 where d_c is 0. Only the largest could cancel in E - e_c."""
    others = tl.where(i_largest == c, total_others, total_others + (e_largest - e))
    return tl.where(others > 0.0, special.reciprocal(tl.maximum(others, _TINY)), 0.0)


@triton.jit
def _pair(x, y):
    """m(x, y), without overflow of x y."""
    low = tl.minimum(x, y)
    share = tl.maximum(x, y) * special.reciprocal(tl.maximum(x + y, _TINY))
    return 2.0 * low * (low * share)


@triton.jit
def _pair_slope(x, y):
    """dm/dx; at the kink x = y the mean of both sides, as |x - y|' = 0 gives."""
    inverse = special.reciprocal(tl.maximum(x + y, _TINY))
    share, other = x * inverse, y * inverse
    below = 2.0 * share * other * (x + 2.0 * y)
    above = 2.0 * other * other * y
    return tl.where(x < y, below, tl.where(x > y, above, 0.5 * (below + above)))


@triton.jit
def _store_maps(
    p_vacuity, p_entropy, p_expected, p_mutual, p_differential, p_dissonance, o, m,
    s, inverse, prior_sum, K, entropy, expected, mutual, differential, dissonance,
    FLAGS: tl.constexpr, BELOW_ONE: tl.constexpr,
):  # fmt: skip
    """The measures with one number a voxel."""
    if _VACUITY & FLAGS:
        tl.store(p_vacuity + o, prior_sum * inverse, mask=m)
    if _ENTROPY & FLAGS:
        tl.store(p_entropy + o, entropy, mask=m)
    if _EXPECTED & FLAGS:
        tl.store(p_expected + o, expected, mask=m)
    if _MUTUAL & FLAGS:
        tl.store(p_mutual + o, mutual - special.digamma_excess(s, BELOW_ONE), mask=m)
    if _DIFFERENTIAL & FLAGS:
        total = special.kl_term(s, tl.cast(K, tl.float32), BELOW_ONE)
        tl.store(p_differential + o, total + differential, mask=m)
    if _DISSONANCE & FLAGS:
        tl.store(p_dissonance + o, dissonance * inverse, mask=m)


@triton.jit
def forward_kernel(
    p_logits, p_prior,
    p_probability, p_vacuity, p_entropy, p_expected, p_mutual, p_differential, p_dissonance,
    voxels, s_image, s_class, s_voxel, prior_sum,
    K: tl.constexpr, FLAGS: tl.constexpr, EVIDENCE: tl.constexpr, UNIT_PRIOR: tl.constexpr,
    BELOW_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Measures of BLOCK voxels; probability is a contiguous (N, K, V), the others (N, V)."""
    i_n, start = _block(BLOCK)
    voxels = tl.cast(voxels, tl.int64)
    s_image, s_class, s_voxel = tl.cast(s_image, tl.int64), tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    o_block = tl.arange(0, BLOCK)  # [BLOCK]
    m = o_block < voxels - start
    o_logit = o_block * s_voxel
    p_logits += i_n * s_image + start * s_voxel
    zero = tl.zeros([BLOCK], tl.float32)

    # 1. Evidence and strength.
    s, concentrations, evidences = zero, (), ()
    total_others, e_largest, i_largest = zero, zero, zero.to(tl.int32)
    for c in tl.static_range(K):
        e = special.evidence(_load_logit(p_logits, c, o_logit, s_class, m), EVIDENCE)
        a = e + _load_prior(p_prior, c, UNIT_PRIOR)
        s += a
        concentrations += (a,)
        if _DISSONANCE & FLAGS:
            evidences += (e,)
            total_others, e_largest, i_largest = _largest(e, c, total_others, e_largest, i_largest)

    # 2. Sums over classes.
    inverse = special.reciprocal(s)
    _, polynomial_s = _digamma_next(s)
    entropy, expected, mutual, differential, dissonance = zero, zero, zero, zero, zero
    p_probability += (i_n * K) * voxels + start
    for c in tl.static_range(K):
        a = concentrations[c]
        p = a * inverse
        if _PROBABILITY & FLAGS:
            tl.store(p_probability + c * voxels + o_block, p, mask=m)
        entropy, expected, mutual, differential = _class_terms(
            a, p, s, polynomial_s, entropy, expected, mutual, differential, FLAGS, BELOW_ONE
        )

    # 3. Pairs of classes.
    if _DISSONANCE & FLAGS:
        inverses = ()
        for c in tl.static_range(K):
            inverses += (_inverse_others(evidences[c], c, total_others, e_largest, i_largest),)
        for i in tl.static_range(K):
            for j in tl.static_range(i + 1, K):
                dissonance += _pair(evidences[i], evidences[j]) * (inverses[i] + inverses[j])
    _store_maps(
        p_vacuity, p_entropy, p_expected, p_mutual, p_differential, p_dissonance, i_n * voxels + start + o_block, m,
        s, inverse, prior_sum, K, entropy, expected, mutual, differential, dissonance, FLAGS, BELOW_ONE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["K"])
def forward_wide_kernel(
    p_logits, p_prior,
    p_probability, p_vacuity, p_entropy, p_expected, p_mutual, p_differential, p_dissonance,
    K, voxels, s_image, s_class, s_voxel, prior_sum,
    FLAGS: tl.constexpr, EVIDENCE: tl.constexpr, UNIT_PRIOR: tl.constexpr,
    BELOW_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for any number of classes."""
    i_n, start = _block(BLOCK)
    voxels = tl.cast(voxels, tl.int64)
    s_image, s_class, s_voxel = tl.cast(s_image, tl.int64), tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    o_block = tl.arange(0, BLOCK)  # [BLOCK]
    m = o_block < voxels - start
    o_logit = o_block * s_voxel
    p_logits += i_n * s_image + start * s_voxel
    zero = tl.zeros([BLOCK], tl.float32)

    # 1. Strength.
    s, total_others, e_largest, i_largest = zero, zero, zero, zero.to(tl.int32)
    for c in range(K):
        e = special.evidence(_load_logit(p_logits, c, o_logit, s_class, m), EVIDENCE)
        s += e + _load_prior(p_prior, c, UNIT_PRIOR)
        total_others, e_largest, i_largest = _largest(e, c, total_others, e_largest, i_largest)

    # 2. Sums over classes.
    inverse = special.reciprocal(s)
    _, polynomial_s = _digamma_next(s)
    entropy, expected, mutual, differential, dissonance = zero, zero, zero, zero, zero
    p_probability += (i_n * K) * voxels + start
    for c in range(K):
        e = special.evidence(_load_logit(p_logits, c, o_logit, s_class, m), EVIDENCE)
        a = e + _load_prior(p_prior, c, UNIT_PRIOR)
        p = a * inverse
        if _PROBABILITY & FLAGS:
            tl.store(p_probability + c * voxels + o_block, p, mask=m)
        entropy, expected, mutual, differential = _class_terms(
            a, p, s, polynomial_s, entropy, expected, mutual, differential, FLAGS, BELOW_ONE
        )

    # 3. Pairs of classes.
    if _DISSONANCE & FLAGS:
        for i in range(K):
            e_i = special.evidence(_load_logit(p_logits, i, o_logit, s_class, m), EVIDENCE)
            inverse_i = _inverse_others(e_i, i, total_others, e_largest, i_largest)
            for j in range(i + 1, K):
                e_j = special.evidence(_load_logit(p_logits, j, o_logit, s_class, m), EVIDENCE)
                inverse_j = _inverse_others(e_j, j, total_others, e_largest, i_largest)
                dissonance += _pair(e_i, e_j) * (inverse_i + inverse_j)
    _store_maps(
        p_vacuity, p_entropy, p_expected, p_mutual, p_differential, p_dissonance, i_n * voxels + start + o_block, m,
        s, inverse, prior_sum, K, entropy, expected, mutual, differential, dissonance, FLAGS, BELOW_ONE,
    )  # fmt: skip


@triton.jit
def _load_upstream(p, o, m, FLAGS: tl.constexpr, BIT: tl.constexpr):
    """The gradient of a measure with one number a voxel; 0 where there is none."""
    if BIT & FLAGS:
        return tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    else:
        return tl.zeros(o.shape, tl.float32)


@triton.jit
def _slope_through_p(
    a, p, s, polynomial_s, p_up_class, o_up, m, up_entropy, up_expected, up_mutual,
    FLAGS: tl.constexpr, BELOW_ONE: tl.constexpr,
):  # fmt: skip
    """dL/dp of one class, up to a constant that all classes share."""
    result = tl.zeros(a.shape, tl.float32)
    if _PROBABILITY & FLAGS:
        result += tl.load(p_up_class + o_up, mask=m, other=0.0).to(tl.float32)
    if _ENTROPY & FLAGS:
        result -= up_entropy * special.ln(p)
    if _EXPECTED & FLAGS:
        result += up_expected * _digamma_gap(a, s, polynomial_s)
    if _MUTUAL & FLAGS:
        result += up_mutual * special.digamma_excess(a, BELOW_ONE)
    return result


@triton.jit
def _common_slope(
    s, inverse, prior_sum, K, mean, up_vacuity, up_expected, up_mutual, up_differential,
    FLAGS: tl.constexpr, BELOW_ONE: tl.constexpr,
):  # fmt: skip
    """What dL/da of every class has in common, other than of the dissonance; `mean` is that of dL/dp under p."""
    result = tl.zeros(s.shape, tl.float32)
    if _THROUGH_P & FLAGS:
        result -= mean * inverse
    if _VACUITY & FLAGS:
        result -= up_vacuity * prior_sum * inverse * inverse
    if (_EXPECTED | _MUTUAL) & FLAGS:
        result += (up_expected - up_mutual) * special.digamma_excess_slope(s, BELOW_ONE)
    if _DIFFERENTIAL & FLAGS:
        result += up_differential * special.kl_term_slope(s, tl.cast(K, tl.float32), BELOW_ONE)
    return result


@triton.jit
def _class_slope(
    a, through_p, inverse, common, up_expected, up_mutual, up_differential,
    FLAGS: tl.constexpr, BELOW_ONE: tl.constexpr,
):  # fmt: skip
    """dL/da of a class, other than of the dissonance, from dL/dp and `_common_slope`."""
    if (_EXPECTED | _MUTUAL) & FLAGS:
        through_p -= (up_expected - up_mutual) * (a * special.digamma_excess_slope(a, BELOW_ONE))
    result = common
    if _THROUGH_P & FLAGS:
        result += through_p * inverse
    if _DIFFERENTIAL & FLAGS:
        result -= up_differential * special.kl_term_slope(a, 1.0, BELOW_ONE)
    return result


@triton.jit
def backward_kernel(
    p_logits, p_prior,
    p_up_probability, p_up_vacuity, p_up_entropy, p_up_expected, p_up_mutual, p_up_differential, p_up_dissonance,
    p_out,
    voxels, s_image, s_class, s_voxel, s_up_image, s_up_class, s_up_voxel, s_out_image, s_out_class, s_out_voxel,
    prior_sum,
    K: tl.constexpr, FLAGS: tl.constexpr, EVIDENCE: tl.constexpr, UNIT_PRIOR: tl.constexpr,
    BELOW_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dz of BLOCK voxels. Strides s_up belong to the probability's gradient; the others' are contiguous (N, V)."""
    i_n, start = _block(BLOCK)
    s_image, s_class, s_voxel = tl.cast(s_image, tl.int64), tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    s_up_class, s_up_voxel = tl.cast(s_up_class, tl.int64), tl.cast(s_up_voxel, tl.int64)
    s_out_class, s_out_voxel = tl.cast(s_out_class, tl.int64), tl.cast(s_out_voxel, tl.int64)
    o_block = tl.arange(0, BLOCK)  # [BLOCK]
    m = o_block < tl.cast(voxels, tl.int64) - start
    o_logit, o_up = o_block * s_voxel, o_block * s_up_voxel
    p_logits += i_n * s_image + start * s_voxel
    p_up_probability += i_n * s_up_image + start * s_up_voxel
    p_out += i_n * s_out_image + start * s_out_voxel
    # Where dL/dz is rounded to 16 bits, the last bits of the evidence's slope do not matter.
    NARROW: tl.constexpr = p_out.dtype.element_ty != tl.float32
    zero = tl.zeros([BLOCK], tl.float32)
    o_map = i_n * voxels + start + o_block
    up_vacuity = _load_upstream(p_up_vacuity, o_map, m, FLAGS, _VACUITY)
    up_entropy = _load_upstream(p_up_entropy, o_map, m, FLAGS, _ENTROPY)
    up_expected = _load_upstream(p_up_expected, o_map, m, FLAGS, _EXPECTED)
    up_mutual = _load_upstream(p_up_mutual, o_map, m, FLAGS, _MUTUAL)
    up_differential = _load_upstream(p_up_differential, o_map, m, FLAGS, _DIFFERENTIAL)
    up_dissonance = _load_upstream(p_up_dissonance, o_map, m, FLAGS, _DISSONANCE)

    # 1. Evidence, its slope and strength.
    s, concentrations, evidences, slopes = zero, (), (), ()
    total_others, e_largest, i_largest = zero, zero, zero.to(tl.int32)
    for c in tl.static_range(K):
        z = _load_logit(p_logits, c, o_logit, s_class, m)
        e = special.evidence(z, EVIDENCE)
        a = e + _load_prior(p_prior, c, UNIT_PRIOR)
        s += a
        concentrations += (a,)
        slopes += (special.evidence_slope(z, e, EVIDENCE, NARROW),)
        if _DISSONANCE & FLAGS:
            evidences += (e,)
            total_others, e_largest, i_largest = _largest(e, c, total_others, e_largest, i_largest)

    # 2. Gradients with respect to p, and their mean under p.
    inverse = special.reciprocal(s)
    _, polynomial_s = _digamma_next(s)
    mean, through_p = zero, ()
    for c in tl.static_range(K):
        slope = zero
        if _THROUGH_P & FLAGS:
            a = concentrations[c]
            slope = _slope_through_p(
                a, a * inverse, s, polynomial_s, p_up_probability + c * s_up_class, o_up, m,
                up_entropy, up_expected, up_mutual, FLAGS, BELOW_ONE,
            )  # fmt: skip
            mean += a * inverse * slope
        through_p += (slope,)

    # 3. Pairs of classes: S times the dissonance, and its derivative.
    pairs, outflow, pair_slopes, outflows = zero, zero, (), ()
    if _DISSONANCE & FLAGS:
        inverses = ()
        for c in tl.static_range(K):
            inverses += (_inverse_others(evidences[c], c, total_others, e_largest, i_largest),)
        for i in tl.static_range(K):
            pair_sum, pair_slope = zero, zero
            for j in tl.static_range(K):
                if i != j:
                    pair_sum += _pair(evidences[i], evidences[j])
                    pair_slope += _pair_slope(evidences[i], evidences[j]) * (inverses[i] + inverses[j])
            weighted = pair_sum * inverses[i]
            pairs += weighted
            outflow += weighted * inverses[i]
            outflows += (weighted * inverses[i],)
            pair_slopes += (pair_slope,)

    # 4. All together.
    common = _common_slope(
        s, inverse, prior_sum, K, mean, up_vacuity, up_expected, up_mutual, up_differential, FLAGS, BELOW_ONE
    )
    if _DISSONANCE & FLAGS:
        common -= up_dissonance * inverse * (outflow + pairs * inverse)
    for c in tl.static_range(K):
        da = _class_slope(
            concentrations[c], through_p[c], inverse, common, up_expected, up_mutual, up_differential, FLAGS, BELOW_ONE
        )
        if _DISSONANCE & FLAGS:
            da += up_dissonance * inverse * (pair_slopes[c] + outflows[c])
        dz = da * slopes[c]
        tl.store(p_out + c * s_out_class + o_block * s_out_voxel, dz.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["K"])
def backward_wide_kernel(
    p_logits, p_prior,
    p_up_probability, p_up_vacuity, p_up_entropy, p_up_expected, p_up_mutual, p_up_differential, p_up_dissonance,
    p_out,
    K, voxels, s_image, s_class, s_voxel, s_up_image, s_up_class, s_up_voxel, s_out_image, s_out_class, s_out_voxel,
    prior_sum,
    FLAGS: tl.constexpr, EVIDENCE: tl.constexpr, UNIT_PRIOR: tl.constexpr,
    BELOW_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`backward_kernel` for any number of classes."""
    i_n, start = _block(BLOCK)
    s_image, s_class, s_voxel = tl.cast(s_image, tl.int64), tl.cast(s_class, tl.int64), tl.cast(s_voxel, tl.int64)
    s_up_class, s_up_voxel = tl.cast(s_up_class, tl.int64), tl.cast(s_up_voxel, tl.int64)
    s_out_class, s_out_voxel = tl.cast(s_out_class, tl.int64), tl.cast(s_out_voxel, tl.int64)
    o_block = tl.arange(0, BLOCK)  # [BLOCK]
    m = o_block < tl.cast(voxels, tl.int64) - start
    o_logit, o_up = o_block * s_voxel, o_block * s_up_voxel
    p_logits += i_n * s_image + start * s_voxel
    p_up_probability += i_n * s_up_image + start * s_up_voxel
    p_out += i_n * s_out_image + start * s_out_voxel
    # Where dL/dz is rounded to 16 bits, the last bits of the evidence's slope do not matter.
    NARROW: tl.constexpr = p_out.dtype.element_ty != tl.float32
    zero = tl.zeros([BLOCK], tl.float32)
    o_map = i_n * voxels + start + o_block
    up_vacuity = _load_upstream(p_up_vacuity, o_map, m, FLAGS, _VACUITY)
    up_entropy = _load_upstream(p_up_entropy, o_map, m, FLAGS, _ENTROPY)
    up_expected = _load_upstream(p_up_expected, o_map, m, FLAGS, _EXPECTED)
    up_mutual = _load_upstream(p_up_mutual, o_map, m, FLAGS, _MUTUAL)
    up_differential = _load_upstream(p_up_differential, o_map, m, FLAGS, _DIFFERENTIAL)
    up_dissonance = _load_upstream(p_up_dissonance, o_map, m, FLAGS, _DISSONANCE)

    # 1. Strength.
    s, total_others, e_largest, i_largest = zero, zero, zero, zero.to(tl.int32)
    for c in range(K):
        e = special.evidence(_load_logit(p_logits, c, o_logit, s_class, m), EVIDENCE)
        s += e + _load_prior(p_prior, c, UNIT_PRIOR)
        total_others, e_largest, i_largest = _largest(e, c, total_others, e_largest, i_largest)

    # 2. The mean under p of the gradients with respect to p.
    inverse = special.reciprocal(s)
    _, polynomial_s = _digamma_next(s)
    mean = zero
    if _THROUGH_P & FLAGS:
        for c in range(K):
            e = special.evidence(_load_logit(p_logits, c, o_logit, s_class, m), EVIDENCE)
            a = e + _load_prior(p_prior, c, UNIT_PRIOR)
            mean += a * inverse * _slope_through_p(
                a, a * inverse, s, polynomial_s, p_up_probability + c * s_up_class, o_up, m,
                up_entropy, up_expected, up_mutual, FLAGS, BELOW_ONE,
            )  # fmt: skip

    # 3. Pairs of classes: S times the dissonance, and the part of its derivative that all classes share.
    common = _common_slope(
        s, inverse, prior_sum, K, mean, up_vacuity, up_expected, up_mutual, up_differential, FLAGS, BELOW_ONE
    )
    if _DISSONANCE & FLAGS:
        pairs, outflow = zero, zero
        for i in range(K):
            e_i = special.evidence(_load_logit(p_logits, i, o_logit, s_class, m), EVIDENCE)
            inverse_i = _inverse_others(e_i, i, total_others, e_largest, i_largest)
            pair_sum = zero
            for j in range(K):
                e_j = special.evidence(_load_logit(p_logits, j, o_logit, s_class, m), EVIDENCE)
                pair_sum += tl.where(i == j, 0.0, _pair(e_i, e_j))
            pairs += pair_sum * inverse_i
            outflow += pair_sum * inverse_i * inverse_i
        common -= up_dissonance * inverse * (outflow + pairs * inverse)

    # 4. All together.
    for c in range(K):
        z = _load_logit(p_logits, c, o_logit, s_class, m)
        e = special.evidence(z, EVIDENCE)
        a = e + _load_prior(p_prior, c, UNIT_PRIOR)
        slope = zero
        if _THROUGH_P & FLAGS:
            slope = _slope_through_p(
                a, a * inverse, s, polynomial_s, p_up_probability + c * s_up_class, o_up, m,
                up_entropy, up_expected, up_mutual, FLAGS, BELOW_ONE,
            )  # fmt: skip
        da = _class_slope(a, slope, inverse, common, up_expected, up_mutual, up_differential, FLAGS, BELOW_ONE)
        if _DISSONANCE & FLAGS:
            inverse_c = _inverse_others(e, c, total_others, e_largest, i_largest)
            pair_sum, pair_slope = zero, zero
            for j in range(K):
                e_j = special.evidence(_load_logit(p_logits, j, o_logit, s_class, m), EVIDENCE)
                inverse_j = _inverse_others(e_j, j, total_others, e_largest, i_largest)
                pair_sum += tl.where(j == c, 0.0, _pair(e, e_j))
                pair_slope += tl.where(j == c, 0.0, _pair_slope(e, e_j) * (inverse_c + inverse_j))
            da += up_dissonance * inverse * (pair_slope + pair_sum * inverse_c * inverse_c)
        dz = da * special.evidence_slope(z, e, EVIDENCE, NARROW)
        tl.store(p_out + c * s_out_class + o_block * s_out_voxel, dz.to(p_out.dtype.element_ty), mask=m)


def block_size(k: int, pairs: bool) -> int:
    """Voxels of a program: two a thread, one where many classes, or their `pairs`, fill the registers."""
    return 256 if k <= (4 if pairs else 8) else 128


def is_wide(k: int, flags: int) -> bool:
    """Whether the kernels that loop at run time serve K classes and these measures."""
    return k > (MOST_STATIC_PAIRS if flags & _BITS["dissonance"] else MOST_STATIC)


# As good as for ever: graphs that were captured read a table's memory when they are replayed.
@functools.lru_cache(maxsize=4096)
def _prior_table(prior: tuple[float, ...], device: torch.device) -> Tensor:
    """The prior on the device, kept there from call to call."""
    return torch.tensor(prior, dtype=torch.float32, device=device)


@planned
def _launch(
    backward: bool,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    evidence: str,
    prior: tuple[float, ...],
    device: torch.device,
    measures: tuple[str, ...],
) -> Launch:
    """The kernel that serves `measures`, on flattened logits (N, K, V)."""
    n, k, voxels = shape
    flags = sum(_BITS[m] for m in measures)
    block = block_size(k, "dissonance" in measures)
    options = {
        "FLAGS": flags,
        "EVIDENCE": evidence,
        "UNIT_PRIOR": set(prior) == {1.0},
        "BELOW_ONE": min(prior) < 1,
        "BLOCK": block,
        "num_warps": warps_on(NUM_WARPS, device),
    }
    grid = (cdiv(voxels, block), n)
    numbers = (voxels, *strides, math.fsum(prior))
    if is_wide(k, flags):
        return Launch(backward_wide_kernel if backward else forward_wide_kernel, grid, (k, *numbers), options)
    return Launch(backward_kernel if backward else forward_kernel, grid, numbers, options | {"K": k})


def _table(prior: tuple[float, ...], z: Tensor) -> Tensor:
    """The prior where kernels read it; anything where it is 1."""
    return z if set(prior) == {1.0} else _prior_table(prior, z.device)


def forward(logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]) -> list[Tensor]:
    """The measures asked for: (N, K, *spatial) for the probability, (N, 1, *spatial) for the others; float32."""
    n, k, *spatial = logits.shape
    outputs = {
        m: torch.empty((n, k if m == "probability" else 1, *spatial), dtype=torch.float32, device=logits.device)
        for m in measures
    }
    z = flat(logits)
    pointers = [outputs.get(m, z) for m in MEASURES]
    launch = _launch(False, z.shape, z.stride(), evidence, prior, z.device, measures)
    with torch.cuda.device_of(z):
        launch(z, _table(prior, z), *pointers)
    return [outputs[m] for m in measures]


def backward(
    grads: list[Tensor], logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]
) -> Tensor:
    """Gradient of sum_m <grads_m, measure_m> with respect to the logits, in their dtype and `gradient_format`."""
    result = torch.empty_like(logits, memory_format=gradient_format(logits))
    z, out = flat(logits), flat(result)
    up = {m: flat(g) if m == "probability" else g.contiguous() for m, g in zip(measures, grads, strict=True)}
    pointers = [*(up.get(m, z) for m in MEASURES), out]
    strides = (*z.stride(), *up.get("probability", z).stride(), *out.stride())
    launch = _launch(True, z.shape, strides, evidence, prior, z.device, measures)
    with torch.cuda.device_of(z):
        launch(z, _table(prior, z), *pointers)
    return result


def compile_cases() -> list[KernelCases]:
    """What dispatch can reach, for `sure_kernels.compile_check`."""
    flags: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(MEASURES, (True, False)),
        "K": tuple(range(2, MOST_STATIC + 1)),
        "evidence": EVIDENCE,
        "prior": ("unit", "above one", "below one"),
        "dtype": ("float32", "bfloat16", "float16"),
        "layout": ("channels first", "channels last", "view"),
    }

    def mask(f: Flags) -> int:
        return sum(_BITS[m] for m in MEASURES if f[m])

    def arguments(kernel: Any, backward: bool) -> Callable[[Flags], Arguments]:
        def build(f: Flags) -> Arguments:
            names = kernel.arg_names
            types = dict.fromkeys((n for n in names if n.startswith("p_")), "*fp32")
            types |= dict.fromkeys((n for n in names if n.startswith("s_")), "int")
            types |= {"p_logits": pointer_type(f["dtype"]), "voxels": "int", "K": "i32", "prior_sum": "fp32"}
            constants = {
                "FLAGS": mask(f),
                "EVIDENCE": f["evidence"],
                "UNIT_PRIOR": f["prior"] == "unit",
                "BELOW_ONE": f["prior"] == "below one",
                "BLOCK": block_size(f["K"], f["dissonance"]),
            }
            if kernel in (forward_kernel, backward_kernel):
                constants["K"] = f["K"]
            units = {"channels first": ("s_voxel", "s_out_voxel"), "channels last": ("s_class", "s_out_class")}
            constants |= dict.fromkeys((n for n in units.get(f["layout"], ()) if n in names), 1)
            if backward:
                types["p_out"] = pointer_type(f["dtype"])
            return Arguments(types, constants, NUM_WARPS)

        return build

    def some(f: Flags) -> bool:
        return any(f[m] for m in MEASURES)

    def unrolled(f: Flags) -> bool:
        return not is_wide(f["K"], _BITS["dissonance"] * f["dissonance"]) and some(f)

    # The kernels that loop at run time compile to the same code for every K beyond their bounds.
    beyond = flags | {"classes": (MOST_STATIC + 1,)}
    del beyond["K"]

    def with_classes(build: Callable[[Flags], Arguments]) -> Callable[[Flags], Arguments]:
        return lambda f: build(f | {"K": f["classes"]})

    op = "dirichlet_uncertainty"
    return [
        KernelCases(forward_kernel, op, "forward", flags, arguments(forward_kernel, False), unrolled),
        KernelCases(backward_kernel, op, "backward", flags, arguments(backward_kernel, True), unrolled),
        KernelCases(
            forward_wide_kernel, op, "forward", beyond, with_classes(arguments(forward_wide_kernel, False)), some
        ),
        KernelCases(
            backward_wide_kernel, op, "backward", beyond, with_classes(arguments(backward_wide_kernel, True)), some
        ),
    ]
