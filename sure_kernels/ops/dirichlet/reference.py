"""Dirichlet measures straight from their formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEASURES = (
    "probability",
    "vacuity",
    "entropy",
    "expected_entropy",
    "mutual_information",
    "differential_entropy",
    "dissonance",
)


def activation(logits: Tensor, kind: str = "softplus") -> Tensor:
    """e = act(z) >= 0."""
    if kind == "softplus":
        # Beyond torch's own threshold of 20 softplus(z) is z + 2e-9, which float64 tells apart.
        return F.softplus(logits, threshold=40.0)
    if kind == "relu":
        return F.relu(logits)
    return torch.exp(logits.clamp(-10, 10))


def class_vector(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Per-class numbers shaped (1, K, 1, ...) beside a map (N, K, *spatial)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, *(1,) * (like.ndim - 2))


def dirichlet_uncertainty(
    logits: Tensor,
    *,
    evidence: str = "softplus",
    prior: tuple[float, ...] = (1.0,),
    measures: tuple[str, ...] = ("probability", "vacuity"),
) -> tuple[Tensor, ...]:
    """The measures asked for, in that order; `prior` holds K numbers or one."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    e = activation(z, evidence)
    b = class_vector(prior, z).expand(1, z.shape[1], *(1,) * (z.ndim - 2))
    a = e + b
    s = a.sum(1, keepdim=True)
    p = a / s
    return tuple(_MEASURE[m](a, b, e, s, p) for m in measures)


def _entropy(a: Tensor, b: Tensor, e: Tensor, s: Tensor, p: Tensor) -> Tensor:
    return -(p * p.log()).sum(1, keepdim=True)


def _expected_entropy(a: Tensor, b: Tensor, e: Tensor, s: Tensor, p: Tensor) -> Tensor:
    return (p * (torch.digamma(s + 1) - torch.digamma(a + 1))).sum(1, keepdim=True)


def _differential_entropy(a: Tensor, b: Tensor, e: Tensor, s: Tensor, p: Tensor) -> Tensor:
    k = a.shape[1]
    log_beta = torch.lgamma(a).sum(1, keepdim=True) - torch.lgamma(s)
    return log_beta + (s - k) * torch.digamma(s) - ((a - 1) * torch.digamma(a)).sum(1, keepdim=True)


def _dissonance(a: Tensor, b: Tensor, e: Tensor, s: Tensor, p: Tensor) -> Tensor:
    """sum_k b_k sum_{j != k} b_j Bal(b_j, b_k) / sum_{j != k} b_j, Bal = 1 - |b_j - b_k| / (b_j + b_k), 0/0 = 0."""
    belief = e / s
    x, y = belief.unsqueeze(2), belief.unsqueeze(1)
    both = x + y
    balance = torch.where(both > 0, 1 - (x - y).abs() / torch.where(both > 0, both, 1.0), 0.0)
    diagonal = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
    others = ~diagonal.view(1, *diagonal.shape, *(1,) * (a.ndim - 2))
    numerator = (torch.where(others, y * balance, 0.0)).sum(2)
    denominator = torch.where(others, y.expand_as(balance), 0.0).sum(2)
    share = torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
    return (belief * share).sum(1, keepdim=True)


_MEASURE = {
    "probability": lambda a, b, e, s, p: p,
    "vacuity": lambda a, b, e, s, p: b.sum(1, keepdim=True) / s,
    "entropy": _entropy,
    "expected_entropy": _expected_entropy,
    "mutual_information": lambda *x: _entropy(*x) - _expected_entropy(*x),
    "differential_entropy": _differential_entropy,
    "dissonance": _dissonance,
}
