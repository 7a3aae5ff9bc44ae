"""Special functions and evidence activations in Triton: the float32 twins of `special`.

Written for instruction count, since the kernels are bound by it: reciprocals are squared reciprocal square roots,
logarithms take the exponent from the bits, and each of digamma, lgamma and trigamma is one polynomial beside them.
Functions of one argument share its reciprocal and logarithm through the compiler's elimination of common
expressions. Arguments are at least 1, or at least 1e-3 with BELOW_ONE, which takes one recurrence step first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sure_kernels.kernel_lib import minimax
from sure_kernels.kernel_lib.special import EXP_LIMIT

SHIFT = tl.constexpr(minimax.SHIFT)
SHIFT_NEXT = tl.constexpr(minimax.SHIFT + 1.0)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
_EXP_LIMIT = tl.constexpr(EXP_LIMIT)
# Exponent bias and mantissa of float32, the bits of 1.0, and those that numbers of [1, 2) may have set.
_BIAS = tl.constexpr(127)
_MANTISSA_BITS = tl.constexpr(23)
_ONE_BITS = tl.constexpr(0x3F800000)
_BELOW_TWO_MASK = tl.constexpr(0x3FFFFFFF)

_P = tl.constexpr(minimax.P)
_Q = tl.constexpr(minimax.Q)
_Q_TAIL = tl.constexpr(minimax.Q[:-1])
_R_TAIL = tl.constexpr(minimax.R[:-1])
_W = tl.constexpr(minimax.W)
_EXCESS = tl.constexpr(minimax.EXCESS)
_EXCESS_SHIFT = tl.constexpr(minimax.EXCESS_SHIFT)
_LOG1P = tl.constexpr(minimax.LOG1P)
_P_TERMS = tl.constexpr(len(minimax.P))
_Q_TERMS = tl.constexpr(len(minimax.Q))
_R_TAIL_TERMS = tl.constexpr(len(minimax.R) - 1)
_W_TERMS = tl.constexpr(len(minimax.W))
_EXCESS_SLOPE = tl.constexpr(minimax.EXCESS_SLOPE)
_EXCESS_SLOPE_TERMS = tl.constexpr(len(minimax.EXCESS_SLOPE))
_EXCESS_TERMS = tl.constexpr(len(minimax.EXCESS))
_LOG1P_TERMS = tl.constexpr(len(minimax.LOG1P))
# What `add_kl_term_one_polynomial` and `subtract_kl_term_polynomial` leave out.
KL_TERM_ONE_CONSTANT = tl.constexpr(minimax.W[-1])
KL_TERM_CONSTANT = tl.constexpr(minimax.Q[-1] - minimax.P[-1])


@triton.jit
def _horner(t, COEFFICIENTS: tl.constexpr, TERMS: tl.constexpr):
    result = t * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, TERMS):
        result = result * t + COEFFICIENTS[i]
    return result


@triton.jit
def reciprocal_fast(y):
    """1 / y for y > 0 to about 4e-7: for the argument of a polynomial."""
    s = tl.rsqrt(y)
    return s * s


@triton.jit
def reciprocal(y):
    """1 / y for y > 0 to about 1e-7, by one Newton step: for what is itself a result."""
    t = reciprocal_fast(y)
    return t + t * (1.0 - y * t)


@triton.jit
def split_exponent(y, one_bits):
    """(m, k) with y = m 2^(k - 127), 1 <= m < 2, for positive normal y: the parts of deferred logarithms.

    `one_bits` are those of 1.0, which compilers should not know where instructions count: with a register for them
    m takes one, else two.
    """
    bits = y.to(tl.int32, bitcast=True)
    m = ((bits | one_bits) & _BELOW_TWO_MASK).to(tl.float32, bitcast=True)
    return m, bits >> _MANTISSA_BITS


@triton.jit
def _ln1p_unit(q):
    """ln(1 + q) for 0 <= q <= 1."""
    return q * _horner(q, _LOG1P, _LOG1P_TERMS)


@triton.jit
def ln(y):
    """ln y for positive normal y; its relative error is small for y >= 1, its absolute error everywhere."""
    m, k = split_exponent(y, _ONE_BITS)
    return (k - _BIAS).to(tl.float32) * LN_2 + _ln1p_unit(m - 1.0)


@triton.jit
def ln1p(x):
    """ln(1 + x) for x > -1; what rounding 1 + x loses is added back."""
    w = 1.0 + x
    return ln(w) + (x - (w - 1.0)) * reciprocal_fast(w)


@triton.jit
def shifted(x, BELOW_ONE: tl.constexpr):
    """y = x + SHIFT, or x + 1 + SHIFT after the recurrence step: the polynomials' argument is 1 / y."""
    if BELOW_ONE:
        return x + SHIFT_NEXT
    else:
        return x + SHIFT


@triton.jit
def digamma_polynomial(t):
    """digamma(x) - ln y of t = 1 / y."""
    return t * _horner(t, _P, _P_TERMS)


@triton.jit
def add_kl_term_one_polynomial(start, t):
    """start + kl_term_one_polynomial(t) - KL_TERM_ONE_CONSTANT: the polynomial's last step is the addition as well."""
    result = t * _W[0] + _W[1]
    for i in tl.static_range(2, _W_TERMS - 1):
        result = result * t + _W[i]
    return start + result * t


@triton.jit
def subtract_kl_term_polynomial(start, t, B: tl.constexpr):
    """start - (kl_term(x, B) + (B - 1/2) ln y) - KL_TERM_CONSTANT + B of t = 1 / y, x >= B.

    x = 1 / t - SHIFT turns (x - B) t P(t) into P(t) - (B + SHIFT) t P(t): all is one polynomial.
    """
    result = t * ((B + SHIFT) * _P[0]) + (_Q[0] - _P[0] + (B + SHIFT) * _P[1])
    for i in tl.static_range(2, _Q_TERMS):
        result = result * t + (_Q[i - 1] - _P[i - 1] + (B + SHIFT) * _P[i])
    return start + result * t


@triton.jit
def kl_term_one_polynomial(t):
    """kl_term(x, 1) + ln(y) / 2 of t = 1 / y, x >= 1."""
    return _horner(t, _W, _W_TERMS)


@triton.jit
def digamma(x, BELOW_ONE: tl.constexpr):
    y = shifted(x, BELOW_ONE)
    result = ln(y) + digamma_polynomial(reciprocal_fast(y))
    if BELOW_ONE:
        result -= reciprocal(x)
    return result


@triton.jit
def digamma_difference(x, gap, BELOW_ONE: tl.constexpr):
    """digamma(x + gap) - digamma(x) for gap >= 0, without cancellation of the logarithms."""
    t = reciprocal(shifted(x, BELOW_ONE))
    t_sum = reciprocal_fast(shifted(x + gap, BELOW_ONE))
    result = ln1p(gap * t) + (digamma_polynomial(t_sum) - digamma_polynomial(t))
    if BELOW_ONE:
        # 1 / x - 1 / (x + gap)
        result += gap * reciprocal(x) * reciprocal(x + gap)
    return result


@triton.jit
def digamma_excess(x, BELOW_ONE: tl.constexpr):
    """digamma(x + 1) - ln x, accurate where it is small beside the logarithm."""
    if BELOW_ONE:
        return ln1p(SHIFT_NEXT * reciprocal(x)) + digamma_polynomial(reciprocal(x + SHIFT_NEXT))
    else:
        s = reciprocal(x + _EXCESS_SHIFT)
        return s * _horner(s, _EXCESS, _EXCESS_TERMS)


@triton.jit
def digamma_excess_slope(x, BELOW_ONE: tl.constexpr):
    """Derivative of `digamma_excess`; with BELOW_ONE plus 1 / x, which is large there.

    In sum p_k slope(a_k) - slope(S) the difference is 1 / S - 1 / S.
    """
    if BELOW_ONE:
        return trigamma(x + 1.0, False)
    else:
        s = reciprocal(x + _EXCESS_SHIFT)
        return (s * -s) * _horner(s, _EXCESS_SLOPE, _EXCESS_SLOPE_TERMS)


@triton.jit
def lgamma(x, BELOW_ONE: tl.constexpr):
    y = shifted(x, BELOW_ONE)
    q = _horner(reciprocal_fast(y), _Q, _Q_TERMS)
    if BELOW_ONE:
        return (x + 0.5) * ln(y) - (x + 1.0) + q - ln(x)
    else:
        return (x - 0.5) * ln(y) - x + q


@triton.jit
def _trigamma_tail(t):
    """trigamma(x) / t - 1 of t = 1 / y."""
    return t * _horner(t, _R_TAIL, _R_TAIL_TERMS)


@triton.jit
def trigamma(x, BELOW_ONE: tl.constexpr):
    t = reciprocal_fast(shifted(x, BELOW_ONE))
    result = t + t * _trigamma_tail(t)
    if BELOW_ONE:
        inverse = reciprocal(x)
        result += inverse * inverse
    return result


@triton.jit
def kl_term(x, b, BELOW_ONE: tl.constexpr):
    """h(x, b) = (x - b) digamma(x) - lgamma(x) - (x - b): a Dirichlet KL divergence is a sum of these."""
    y = shifted(x, BELOW_ONE)
    t = reciprocal_fast(y)
    p, q = digamma_polynomial(t), _horner(t, _Q, _Q_TERMS)
    if BELOW_ONE:
        return (-0.5 - b) * ln(y) + (x - b) * (p - reciprocal(x)) - q + ln(x) + (b + 1.0)
    else:
        return (0.5 - b) * ln(y) + (x - b) * p - q + b


@triton.jit
def kl_share(e, b, p_prior, s_prior, BELOW_ONE: tl.constexpr):
    """kl_term(b + e, b) + lgamma(b), of which neither is small where b is large: the twin of `special.kl_share`.

    p_prior points to the inverse, the offset and the ratio of `special.concentration`, s_prior apart.
    """
    y = shifted(e + b, BELOW_ONE)
    t = reciprocal(y) if BELOW_ONE else reciprocal_fast(y)
    result = (0.5 - b) * ln1p(e * tl.load(p_prior)) + tl.load(p_prior + s_prior)
    result += t * (e * _horner(t, _P, _P_TERMS) - _horner(t, _Q_TAIL, _Q_TERMS - 1))
    if BELOW_ONE:
        result += ln1p(e * t * tl.load(p_prior + 2 * s_prior)) - e * reciprocal(e + b)
    return result


@triton.jit
def kl_term_slope(x, b, BELOW_ONE: tl.constexpr):
    """dh/dx = (x - b) trigamma(x) - 1; x trigamma(x) tends to 1, which is taken off inside the polynomial."""
    t = reciprocal_fast(shifted(x, BELOW_ONE))
    tail = _trigamma_tail(t)
    result = tail - shifted(b, BELOW_ONE) * (t + t * tail)
    if BELOW_ONE:
        inverse = reciprocal(x)
        result += (x - b) * inverse * inverse
    return result


@triton.jit
def trigamma_and_kl_slope(e, b):
    """trigamma(x) and kl_term_slope(x, b) of x = b + e >= 1."""
    t = reciprocal_fast(e + (b + SHIFT))
    tail = _trigamma_tail(t)
    trigamma_x = t + t * tail
    return trigamma_x, tail - (b + SHIFT) * trigamma_x


@triton.jit
def evidence(z, KIND: tl.constexpr):
    """e = act(z) >= 0: softplus, relu, or exp of z clamped to [-10, 10]. NaN stays NaN."""
    if KIND == "softplus":
        return tl.maximum(z, 0.0) + _ln1p_unit(tl.exp2(tl.abs(z) * -LOG2_E))
    elif KIND == "relu":
        return tl.where(z < 0.0, 0.0, z)
    else:
        return tl.exp(tl.where(z < -_EXP_LIMIT, -_EXP_LIMIT, tl.where(z > _EXP_LIMIT, _EXP_LIMIT, z)))


@triton.jit
def evidence_slope(z, e, KIND: tl.constexpr, NARROW: tl.constexpr = False):
    """de / dz, given e = evidence(z, KIND); NARROW where it ends up in 16 bits."""
    if KIND == "softplus":
        q = tl.exp2(tl.abs(z) * -LOG2_E)
        r = reciprocal_fast(1.0 + q) if NARROW else reciprocal(1.0 + q)
        return tl.where(z >= 0.0, r, q * r)
    elif KIND == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        return tl.where(tl.abs(z) <= _EXP_LIMIT, e, 0.0)
