"""Dirichlet measures and their gradients in one sweep over the logits, which alone are kept for backward.

With a = e + b, S = sum a, p = a / S, h(x, c) = (x - c) digamma(x) - lgamma(x) - (x - c) and
delta(x) = digamma(x + 1) - ln x:

    mutual information   = sum_k p_k delta(a_k) - delta(S)          (no difference of two entropies)
    differential entropy = h(S, K) - sum_k h(a_k, 1)
    dissonance           = (1 / S) sum_k (1 / d_k) sum_{j != k} m(e_j, e_k),
                           m(x, y) = 2 x y min(x, y) / (x + y), d_k = sum_{j != k} e_j

Gradients with respect to p reach a through dL/da_j = (dL/dp_j - sum_k p_k dL/dp_k) / S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import flat, voxel_slices, working_dtype
from sure_kernels.kernel_lib.special import (
    digamma_difference,
    digamma_next_minus_log,
    evidence_slope,
    kl_term,
    kl_term_slope,
    trigamma,
)
from sure_kernels.kernel_lib.special import evidence as evidence_of

# Temporaries a voxel, in units of K.
_ROWS = 4


def forward(logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]) -> list[Tensor]:
    """The measures asked for: (N, K, *spatial) for the probability, (N, 1, *spatial) for the others."""
    n, k, *spatial = logits.shape
    dtype = working_dtype(logits.dtype)
    outputs = [
        torch.empty((n, k if m == "probability" else 1, *spatial), dtype=dtype, device=logits.device) for m in measures
    ]
    z_all, flat_outputs = flat(logits), [flat(out) for out in outputs]
    b = torch.tensor(prior, dtype=dtype, device=logits.device).unsqueeze(1)
    for image, voxels in voxel_slices(z_all, _ROWS * k):
        e = evidence_of(z_all[image, :, voxels].to(dtype), evidence)
        values = _Measures(e, b, min(prior) < 1)
        for name, out in zip(measures, flat_outputs, strict=True):
            out[image, :, voxels] = values.measure(name)
    return outputs


def backward(
    grads: list[Tensor], logits: Tensor, evidence: str, prior: tuple[float, ...], measures: tuple[str, ...]
) -> Tensor:
    """Gradient of sum_m <grads_m, measure_m> with respect to the logits, in their dtype."""
    k = logits.shape[1]
    dtype = working_dtype(logits.dtype)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    z_all, out, flat_grads = flat(logits), flat(result), [flat(g) for g in grads]
    b = torch.tensor(prior, dtype=dtype, device=logits.device).unsqueeze(1)
    for image, voxels in voxel_slices(z_all, _ROWS * k):
        z = z_all[image, :, voxels].to(dtype)
        e = evidence_of(z, evidence)
        values = _Measures(e, b, min(prior) < 1)
        de = torch.zeros_like(e)
        for name, g in zip(measures, flat_grads, strict=True):
            de += values.gradient(name, g[image, :, voxels].to(dtype))
        out[image, :, voxels] = de * evidence_slope(z, e, evidence)
    return result


class _Measures:
    """The measures of a piece of volume: e [K, B] evidence, b [K, 1] prior."""

    def __init__(self, e: Tensor, b: Tensor, below_one: bool) -> None:
        self.e, self.below_one = e, below_one
        self.k = e.shape[0]
        self.prior_sum = b.sum()
        self.a = e + b
        self.s = self.a.sum(0, keepdim=True)
        self.p = self.a / self.s

    def measure(self, name: str) -> Tensor:
        if name == "probability":
            return self.p
        if name == "vacuity":
            return self.prior_sum / self.s
        if name == "entropy":
            return -(self.p * self.p.log()).sum(0, keepdim=True)
        if name == "expected_entropy":
            return (self.p * self._digamma_gap()).sum(0, keepdim=True)
        if name == "mutual_information":
            inner = (self.p * digamma_next_minus_log(self.a)).sum(0, keepdim=True)
            return inner - digamma_next_minus_log(self.s)
        if name == "differential_entropy":
            inner = kl_term(self.a, 1.0, self.below_one).sum(0, keepdim=True)
            return kl_term(self.s, float(self.k), self.below_one) - inner
        return self._dissonance()[0]

    def gradient(self, name: str, up: Tensor) -> Tensor:
        """dL/de for upstream gradient `up` ([K, B] or [1, B])."""
        if name == "probability":
            return self._through_p(up)
        if name == "vacuity":
            return (-up * self.prior_sum / self.s.square()).expand_as(self.e)
        if name == "entropy":
            return up * self._through_p(-self.p.log())
        if name == "expected_entropy":
            return up * (self._through_p(self._digamma_gap()) + self._expected_entropy_direct())
        if name == "mutual_information":
            return up * (self._through_p(digamma_next_minus_log(self.a)) - self._expected_entropy_direct())
        if name == "differential_entropy":
            total = kl_term_slope(self.s, float(self.k), self.below_one)
            return up * (total - kl_term_slope(self.a, 1.0, self.below_one))
        value, slope = self._dissonance()
        return up * (slope - value) / self.s

    def _digamma_gap(self) -> Tensor:
        """digamma(S + 1) - digamma(a_k + 1)."""
        return digamma_difference(self.a + 1.0, self.s - self.a, below_one=False)

    def _expected_entropy_direct(self) -> Tensor:
        """The part of its gradient that does not go through p."""
        return trigamma(self.s + 1.0, False) - self.p * trigamma(self.a + 1.0, False)

    def _through_p(self, dp: Tensor) -> Tensor:
        return (dp - (self.p * dp).sum(0, keepdim=True)) / self.s

    def _dissonance(self) -> tuple[Tensor, Tensor]:
        """The dissonance [1, B], and its derivative with respect to the beliefs e / S [K, B].

        It is homogeneous of degree 1 in them, so that dL/de_j = (slope_j - value) / S.
        """
        e = self.e / self.s
        tiny = torch.finfo(e.dtype).tiny
        others = torch.stack([e[:i].sum(0) + e[i + 1 :].sum(0) for i in range(self.k)])
        inverse = torch.where(others > 0, others.clamp_min(tiny).reciprocal(), 0.0)
        pair_sums, slope = torch.empty_like(e), torch.empty_like(e)
        for i in range(self.k):
            x = e[i : i + 1]
            both = (x + e).clamp_min(tiny)
            x_share, y_share = x / both, e / both
            m = 2 * torch.minimum(x, e).square() * torch.maximum(x_share, y_share)
            # dm/dx on either side of x = y, where m has a kink; there the mean of both, as |x - y|' = 0 gives.
            below = 2 * x_share * y_share * (x + 2 * e)
            above = 2 * y_share.square() * e
            dm = torch.where(x < e, below, torch.where(x > e, above, 0.5 * (below + above)))
            m[i], dm[i] = 0.0, 0.0
            pair_sums[i] = m.sum(0)
            slope[i] = (dm * (inverse + inverse[i])).sum(0)
        weighted = pair_sums * inverse
        outflow = weighted * inverse
        slope -= outflow.sum(0, keepdim=True) - outflow
        return weighted.sum(0, keepdim=True), slope
