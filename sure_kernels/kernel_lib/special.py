"""Special functions and evidence activations of the closed forms, in PyTorch.

float32 takes the minimax forms (one logarithm and one reciprocal for all of them); float64 takes torch's own.
`below_one` says that arguments may lie in [1e-3, 1): then one recurrence step comes first,
digamma(x) = digamma(x + 1) - 1 / x, and so on.

The same functions serve eagerly, where a pass over memory is what costs, and inside torch.compile, where passes fuse
and arithmetic is what costs: `compiling` marks the few places where the two want different words for the same thing.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib import minimax

EVIDENCE = ("softplus", "relu", "exp")
EXP_LIMIT = 10.0

Number = Tensor | float


def compiling() -> bool:
    """Whether torch.compile is tracing."""
    return torch.compiler.is_compiling()


def plus_product(x: Tensor, a: Tensor, b: Number) -> Tensor:
    """x + a b, written over x where nothing is traced."""
    if compiling():
        return x + a * b
    return x.addcmul_(a, b) if isinstance(b, Tensor) else x.add_(a, alpha=b)


def _horner(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    result = t * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        # One pass instead of two: a 0-d tensor is what addcmul takes for a number.
        result = result * t + c if compiling() else torch.addcmul(_scalar(c, t), result, t, out=result)
    return result


def _scalar(value: float, like: Tensor) -> Tensor:
    key = (value, like.dtype, like.device)
    if key not in _SCALARS:
        _SCALARS[key] = torch.tensor(value, dtype=like.dtype, device=like.device)
    return _SCALARS[key]


_SCALARS: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}


def _shift(below_one: bool) -> float:
    """y - x of the minimax forms' y = x' + SHIFT, where x' is x, or x + 1 after the recurrence step."""
    return minimax.SHIFT + below_one


def _shifted(x: Tensor, below_one: bool) -> tuple[Tensor, Tensor]:
    """y of the minimax forms, and 1 / y."""
    y = x + _shift(below_one)
    return y, y.reciprocal()


def digamma_difference(x: Tensor, gap: Tensor, below_one: bool) -> Tensor:
    """digamma(x + gap) - digamma(x) for gap >= 0, without cancellation of the logarithms."""
    if x.dtype == torch.float64:
        return torch.digamma(x + gap) - torch.digamma(x)
    _, t = _shifted(x, below_one)
    _, t_sum = _shifted(x + gap, below_one)
    result = torch.log1p(gap * t) + (_horner(minimax.P, t_sum) * t_sum - _horner(minimax.P, t) * t)
    if below_one:
        result = result + x.reciprocal() - (x + gap).reciprocal()
    return result


def digamma_excess(x: Tensor, below_one: bool) -> Tensor:
    """digamma(x + 1) - ln x, accurate where it is small beside the logarithm."""
    if x.dtype == torch.float64:
        return torch.digamma(x + 1) - torch.log(x)
    if not below_one:
        s = (x + minimax.EXCESS_SHIFT).reciprocal()
        return _horner(minimax.EXCESS, s) * s
    _, t = _shifted(x, below_one=True)
    return torch.log1p((minimax.SHIFT + 1) / x) + _horner(minimax.P, t) * t


def digamma_excess_slope(x: Tensor, below_one: bool) -> Tensor:
    """Derivative of `digamma_excess`; in float64 and with `below_one`, where that is large, plus 1 / x.

    In sum p_k slope(a_k) - slope(S) the difference is 1 / S - 1 / S.
    """
    if below_one or x.dtype == torch.float64:
        return trigamma(x + 1.0, below_one=False)
    s = (x + minimax.EXCESS_SHIFT).reciprocal()
    return _horner(minimax.EXCESS_SLOPE, s) * s * -s


def trigamma(x: Tensor, below_one: bool) -> Tensor:
    if x.dtype == torch.float64:
        return torch.polygamma(1, x)
    _, t = _shifted(x, below_one)
    result = t * _horner(minimax.R, t)
    return result + x.reciprocal().square() if below_one else result


def kl_term(x: Tensor, b: Number, below_one: bool) -> Tensor:
    """h(x, b) = (x - b) digamma(x) - lgamma(x) - (x - b).

    The KL divergence of two Dirichlet distributions is a sum of these; the terms linear in x, which would cancel
    between them, are already gone.
    """
    if x.dtype == torch.float64:
        return (x - b) * torch.digamma(x) - torch.lgamma(x) - (x - b)
    y, t = _shifted(x, below_one)
    if isinstance(b, float) and b == 1.0 and not below_one:
        return _horner(minimax.W, t) - 0.5 * torch.log(y)
    p, q = _horner(minimax.P, t) * t, _horner(minimax.Q, t)
    if below_one:
        # ln x - L as one logarithm: the two would cancel where x is large.
        rest = (x - b) * (p - x.reciprocal()) - q - torch.log1p((minimax.SHIFT + 1) / x) + (b + 1.0)
        return (0.5 - b) * torch.log(y) + rest
    return (0.5 - b) * torch.log(y) + (x - b) * p - q + b


class Concentration(NamedTuple):
    """A prior concentration, or a sum of them, and what `kl_share` needs of it: Python's numbers or 0-d tensors.

    With y the minimax forms' argument for `value`: `inverse` is 1 / y, `offset` the polynomial of lgamma there without
    its constant, `ratio` what of y is not `value`, over it (needed below 1).
    """

    value: Number
    lgamma: Number
    inverse: Number
    offset: Number
    ratio: Number


def concentration(value: float, below_one: bool) -> Concentration:
    shift = _shift(below_one)
    t = 1 / (value + shift)
    offset = t * functools.reduce(lambda result, c: result * t + c, minimax.Q[:-1])
    return Concentration(value, math.lgamma(value), t, offset, shift / value)


def kl_share(e: Tensor, prior: Concentration, below_one: bool) -> Tensor:
    """h(b + e, b) + lgamma(b) of h as in `kl_term`: what a concentration adds to a Dirichlet KL divergence.

    The logarithms are taken of ratios to the prior: lgamma of either alone is large beside the result, and more so the
    larger the prior.
    """
    b = prior.value
    if e.dtype == torch.float64:
        x = e + b
        return e * torch.digamma(x) - torch.lgamma(x) + prior.lgamma - e
    if isinstance(b, float) and b == 1.0 and not below_one:
        return kl_term(e + b, b, below_one)
    t = (e + (b + _shift(below_one))).reciprocal()
    rest = (_horner(minimax.P, t) * e - _horner(minimax.Q[:-1], t)) * t
    result = plus_product(rest, torch.log1p(e * prior.inverse), 0.5 - b)
    if below_one:
        result = result + torch.log1p(e * t * prior.ratio) - e / (e + b)
    return result + prior.offset


def kl_term_slope(x: Tensor, b: Number, below_one: bool) -> Tensor:
    """dh/dx = (x - b) trigamma(x) - 1, small where x is large: x trigamma(x) tends to 1, and the 1 is taken off
    inside the polynomial."""
    if x.dtype == torch.float64:
        return (x - b) * torch.polygamma(1, x) - 1.0
    _, t = _shifted(x, below_one)
    r_tail = _horner(minimax.R[:-1], t)
    r = r_tail * t + minimax.R[-1]
    result = t * (r_tail - (b + _shift(below_one)) * r)
    return result + (x - b) / x.square() if below_one else result


class SlopeOfSum(NamedTuple):
    """t trigamma(B + t) of the evidence t beside the sum B of the priors, in the parts that `kl_slope` takes.

    With y and its inverse as in `shifted`: y(B) / y(B + t), t / y(B + t), and what t trigamma(B + t) is beyond that.
    """

    rest: Tensor
    lead: Tensor
    tail: Tensor


def _trigamma_tail(t: Tensor) -> Tensor:
    """trigamma(x) / t - 1 of t = 1 / y."""
    return _horner(minimax.R[:-1], t) * t


def slope_of_sum(t: Tensor, b: Number, below_one: bool) -> SlopeOfSum:
    if t.dtype == torch.float64:
        nothing = torch.zeros_like(t)
        return SlopeOfSum(nothing, nothing, t * torch.polygamma(1, t + b))
    y = b + _shift(below_one)
    inverse = (t + y).reciprocal()
    lead = t * inverse
    tail = lead * _trigamma_tail(inverse)
    if below_one:
        tail = tail + t / (t + b).square()
    return SlopeOfSum(y * inverse, lead, tail)


def kl_slope(e: Tensor, b: Number, total: SlopeOfSum, below_one: bool) -> Tensor:
    """e trigamma(b + e) - t trigamma(B + t): the derivative of the KL divergence by a wrong class's concentration.

    Either is nearly 1 where evidence is large beside the priors, and nearly 0 where the priors are: their difference is
    taken of e / y(b + e) - t / y(B + t) = (e y(B) - t y(b)) / (y(b + e) y(B + t)).
    """
    if e.dtype == torch.float64:
        return e * torch.polygamma(1, e + b) - total.tail
    y = b + _shift(below_one)
    inverse = (e + y).reciprocal()
    result = (_trigamma_tail(inverse) + total.rest) * e
    result = plus_product(result, total.lead, -y) * inverse - total.tail
    return result + e / (e + b).square() if below_one else result


def evidence(z: Tensor, kind: str) -> Tensor:
    """e = act(z) >= 0: softplus, relu, or exp of z clamped to [-10, 10]."""
    if kind == "softplus":
        if not compiling():
            # Beyond the threshold softplus(z) = z to the last bit.
            return torch.nn.functional.softplus(z, threshold=40.0 if z.dtype == torch.float64 else 20.0)
        q = torch.exp(-z.abs())
        return z.clamp_min(0) + q * _horner(minimax.LOG1P, q)
    if kind == "relu":
        return z.clamp_min(0)
    return torch.exp(z.clamp(-EXP_LIMIT, EXP_LIMIT))


def evidence_slope(z: Tensor, e: Tensor, kind: str) -> Tensor:
    """de / dz, given e = evidence(z, kind)."""
    if kind == "softplus":
        if not compiling():
            return torch.sigmoid(z)
        # Of the exponential that the evidence has taken already.
        q = torch.exp(-z.abs())
        r = (1 + q).reciprocal()
        return torch.where(z >= 0, r, q * r)
    if kind == "relu":
        return z.clone().gt_(0)
    return torch.where(z.abs() <= EXP_LIMIT, e, 0.0)
