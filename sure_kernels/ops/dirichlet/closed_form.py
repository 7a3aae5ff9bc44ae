"""Dirichlet measures and their gradients in one sweep over the logits, which alone are kept for backward.

With a = e + b, S = sum a, p = a / S, h(x, c) = (x - c) digamma(x) - lgamma(x) - (x - c) and
delta(x) = digamma(x + 1) - ln x:

    mutual information   = sum_k p_k delta(a_k) - delta(S)          (no difference of two entropies)
    differential entropy = h(S, K) - sum_k h(a_k, 1)
    dissonance           = (1 / S) sum_k (1 / d_k) sum_{j != k} m(e_j, e_k),
                           m(x, y) = 2 x y min(x, y) / (x + y), d_k = sum_{j != k} e_j

Gradients with respect to p reach a through dL/da_j = (dL/dp_j - sum_k p_k dL/dp_k) / S.

`measures_of` and `gradient_of` are the formulas for a piece of volume, one tensor a class; the compiled backend fuses
the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import flat, voxel_slices, working_dtype
from sure_kernels.kernel_lib.special import (
    Number,
    digamma_difference,
    digamma_excess,
    digamma_excess_slope,
    evidence_slope,
    kl_term,
    kl_term_slope,
)
from sure_kernels.kernel_lib.special import evidence as evidence_of


def number_of_maps(measure: str, k: int) -> int:
    """Channels of a measure."""
    return k if measure == "probability" else 1


def forward(logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]) -> list[Tensor]:
    """The measures asked for: (N, K, *spatial) for the probability, (N, 1, *spatial) for the others."""
    n, k, *spatial = logits.shape
    dtype = working_dtype(logits.dtype)
    outputs = [logits.new_empty((n, number_of_maps(m, k), *spatial), dtype=dtype) for m in measures]
    z, flat_outputs = flat(logits), [flat(out) for out in outputs]
    for image, voxels in voxel_slices(z):
        piece = [c[voxels].to(dtype) for c in z[image]]
        for out, maps in zip(flat_outputs, measures_of(piece, measures, evidence, prior, min(prior) < 1), strict=True):
            for channel, values in enumerate(maps):
                out[image, channel, voxels] = values
    return outputs


def backward(
    grads: list[Tensor], logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]
) -> Tensor:
    """Gradient of sum_m <grads_m, measure_m> with respect to the logits, in their dtype."""
    dtype = working_dtype(logits.dtype)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    z, out, flat_grads = flat(logits), flat(result), [flat(g) for g in grads]
    for image, voxels in voxel_slices(z):
        piece = [c[voxels].to(dtype) for c in z[image]]
        upstream = [[c[voxels].to(dtype) for c in g[image]] for g in flat_grads]
        for k, dz in enumerate(gradient_of(piece, upstream, measures, evidence, prior, min(prior) < 1)):
            out[image, k, voxels] = dz
    return result


def measures_of(
    z: Sequence[Tensor], measures: tuple[str, ...], evidence: str, prior: Sequence[Number], below_one: bool
) -> list[list[Tensor]]:
    """The channels of each measure, of a piece with logits z [B] of each class."""
    values = _Measures(z, evidence, prior, below_one)
    return [values.measure(name) for name in measures]


def gradient_of(
    z: Sequence[Tensor],
    upstream: Sequence[Sequence[Tensor]],
    measures: tuple[str, ...],
    evidence: str,
    prior: Sequence[Number],
    below_one: bool,
) -> list[Tensor]:
    """dL/dz of each class, from the upstream gradients of the channels of each measure."""
    values = _Measures(z, evidence, prior, below_one)
    slopes = _Slopes(values)
    for name, up in zip(measures, upstream, strict=True):
        slopes.add(name, up)
    de = slopes.by_evidence()
    return [d * evidence_slope(x, e, evidence) for d, x, e in zip(de, z, values.e, strict=True)]


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """sum over classes of x y."""
    result = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        result = result.addcmul_(a, b)
    return result


class _Measures:
    """The measures of a piece of volume, from logits [B] and prior of each class."""

    def __init__(self, z: Sequence[Tensor], evidence: str, prior: Sequence[Number], below_one: bool) -> None:
        self.below_one = below_one
        self.prior_sum: Number = sum(prior)
        self.e = [evidence_of(x, evidence) for x in z]
        self.a = [e + b for e, b in zip(self.e, prior, strict=True)]
        self.s = _sum(self.a)
        self.inverse = self.s.reciprocal()
        self.p = [a * self.inverse for a in self.a]

    def measure(self, name: str) -> list[Tensor]:
        if name == "probability":
            return self.p
        if name == "vacuity":
            return [self.prior_sum * self.inverse]
        if name == "entropy":
            return [-_dot(self.p, self.log_p())]
        if name == "expected_entropy":
            return [_dot(self.p, self.digamma_gaps())]
        if name == "mutual_information":
            return [_dot(self.p, self.digamma_excesses()) - digamma_excess(self.s, self.below_one)]
        if name == "differential_entropy":
            inner = _sum([kl_term(a, 1.0, self.below_one) for a in self.a])
            return [kl_term(self.s, float(len(self.a)), self.below_one) - inner]
        return [_Dissonance(self.e, self.inverse).value]

    def log_p(self) -> list[Tensor]:
        return [p.log() for p in self.p]

    def digamma_gaps(self) -> list[Tensor]:
        """digamma(S + 1) - digamma(a_k + 1)."""
        return [digamma_difference(a + 1.0, self.s - a, below_one=False) for a in self.a]

    def digamma_excesses(self) -> list[Tensor]:
        """digamma(a_k + 1) - ln a_k."""
        return [digamma_excess(a, self.below_one) for a in self.a]


class _Slopes:
    """Derivatives of a sum of measures: by p, by all of e alike, and by one e directly."""

    def __init__(self, values: _Measures) -> None:
        self.values = values
        self.by_p: list[Tensor] | None = None
        self.common = torch.zeros_like(values.s)
        self.own: list[Tensor] | None = None

    def _add_by_p(self, up: Tensor, slopes: Sequence[Tensor]) -> None:
        if self.by_p is None:
            self.by_p = [torch.zeros_like(x) for x in slopes]
        for total, x in zip(self.by_p, slopes, strict=True):
            total.addcmul_(up, x)

    def _add_own(self, up: Tensor, slopes: Sequence[Tensor]) -> None:
        if self.own is None:
            self.own = [torch.zeros_like(x) for x in slopes]
        for total, x in zip(self.own, slopes, strict=True):
            total.addcmul_(up, x)

    def add(self, name: str, up: Sequence[Tensor]) -> None:
        """Add a measure, with the upstream gradients of its channels."""
        v = self.values
        if name == "probability":
            self._add_by_p(torch.ones_like(v.s), up)
        elif name == "vacuity":
            self.common = self.common - up[0] * v.prior_sum * v.inverse.square()
        elif name == "entropy":
            self._add_by_p(-up[0], v.log_p())
        elif name == "expected_entropy":
            self._add_by_p(up[0], v.digamma_gaps())
            self._add_expected_entropy(up[0])
        elif name == "mutual_information":
            self._add_by_p(up[0], v.digamma_excesses())
            self._add_expected_entropy(-up[0])
        elif name == "differential_entropy":
            self.common = self.common + up[0] * kl_term_slope(v.s, float(len(v.a)), v.below_one)
            self._add_own(-up[0], [kl_term_slope(a, 1.0, v.below_one) for a in v.a])
        else:
            dissonance = _Dissonance(v.e, v.inverse)
            shares = [(slope - dissonance.value) * v.inverse for slope in dissonance.slopes()]
            self._add_own(up[0], shares)

    def _add_expected_entropy(self, up: Tensor) -> None:
        """The part of the expected entropy's gradient that does not go through p."""
        v = self.values
        self.common = self.common + up * digamma_excess_slope(v.s, v.below_one)
        self._add_own(-up, [p * digamma_excess_slope(a, v.below_one) for p, a in zip(v.p, v.a, strict=True)])

    def by_evidence(self) -> list[Tensor]:
        """dL/de of each class."""
        v = self.values
        if self.by_p is None:
            result = [self.common] * len(v.e)
        else:
            common = self.common - _dot(v.p, self.by_p) * v.inverse
            result = [torch.addcmul(common, x, v.inverse) for x in self.by_p]
        return result if self.own is None else [x + own for x, own in zip(result, self.own, strict=True)]


class _Dissonance:
    """The dissonance of a piece, from the beliefs x_k = e_k / S.

    It is homogeneous of degree 1 in them, so that dL/de_j = (slope_j - value) / S.
    """

    def __init__(self, e: Sequence[Tensor], inverse: Tensor) -> None:
        self.x = [c * inverse for c in e]
        self.tiny = torch.finfo(inverse.dtype).tiny
        before, after = [torch.zeros_like(inverse)], [torch.zeros_like(inverse)]
        for c in self.x[:-1]:
            before.append(before[-1] + c)
        for c in self.x[:0:-1]:
            after.append(after[-1] + c)
        # Sums over the other classes, without taking a class off the sum of all.
        others = [a + b for a, b in zip(before, reversed(after), strict=True)]
        self.weights = [torch.where(d > 0, d.clamp_min(self.tiny).reciprocal(), 0.0) for d in others]
        self.pairs = [(i, j) for i in range(len(e)) for j in range(i)]
        sums = [torch.zeros_like(inverse) for _ in e]
        for i, j in self.pairs:
            x, y = self.x[i], self.x[j]
            m = 2 * torch.minimum(x, y).square() * (torch.maximum(x, y) / (x + y).clamp_min(self.tiny))
            sums[i] += m
            sums[j] += m
        self.weighted = [total * w for total, w in zip(sums, self.weights, strict=True)]
        self.value = _sum(self.weighted)

    def slopes(self) -> list[Tensor]:
        """Derivatives by the beliefs."""
        slopes = [torch.zeros_like(self.value) for _ in self.x]
        for i, j in self.pairs:
            x, y = self.x[i], self.x[j]
            both = (x + y).clamp_min(self.tiny)
            x_share, y_share = x / both, y / both
            weight = self.weights[i] + self.weights[j]
            slopes[i] += weight * _pair_slope(x, y, x_share, y_share)
            slopes[j] += weight * _pair_slope(y, x, y_share, x_share)
        outflows = [x * w for x, w in zip(self.weighted, self.weights, strict=True)]
        total = _sum(outflows)
        return [slope - (total - out) for slope, out in zip(slopes, outflows, strict=True)]


def _pair_slope(x: Tensor, y: Tensor, x_share: Tensor, y_share: Tensor) -> Tensor:
    """dm/dx on either side of x = y, where m has a kink; there the mean of both, as |x - y|' = 0 gives."""
    below = 2 * x_share * y_share * (x + 2 * y)
    above = 2 * y_share.square() * y
    return torch.where(x < y, below, torch.where(x > y, above, 0.5 * (below + above)))
