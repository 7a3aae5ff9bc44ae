"""The evidential loss, optionally with its supervision, as two sweeps over the logits.

`sums` makes one row of running sums per image; from these `finalise` gets the loss, its terms and one row of
coefficients per image; `gradient` turns the coefficients into dL/dz, recomputing from the logits what it needs.
Between the sweeps nothing of full size is kept but the logits and one small integer a voxel.

Per voxel with label y, e = act(z), a = e + b, S = sum a, B = sum b, t = sum of e over the wrong classes:

    digamma ACE = psi(S) - psi(a_y)                 S - a_y = t + B - b_y, so the logarithms never cancel
    KL          = sum over wrong k of h(a_k, b_k) + sum lgamma(b) - lgamma(B) - h(t + B, B)
                  with h(x, c) = (x - c) psi(x) - lgamma(x) - (x - c) and lgamma(b) of the wrong classes only
    vacuity u   = B / S

Sums of an image, in this order: counted voxels, their weights, weighted ACE, weighted KL, then per class
TP_k = sum [y = k] p_k, P_k = sum p_k, N_k = #[y = k], then the supervision's (number, g, g^2, u, ug, u^2) over
boundary voxels and (number, u) over far ones. Coefficients: ACE, KL, then per class dL/dTP_k, dL/dP_k, then
(c_g, c_u, c_far) with dL/du = c_g (g - mean g) + c_u (u - mean u) on the boundary and c_far far away; the means
come beside them, since an upstream gradient scales the coefficients but not the means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import flat, voxel_slices, working_dtype
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR, unpack_labels
from sure_kernels.kernel_lib.special import (
    digamma_difference,
    evidence_slope,
    kl_term,
    kl_term_slope,
    trigamma,
)
from sure_kernels.kernel_lib.special import evidence as evidence_of
from sure_kernels.ops.evidential.reference import SMOOTH_TARGET, SOFT_DICE_EPS, TVERSKY_EPS

# Temporaries a voxel, in units of K.
_ROWS = 3
SCALAR_SUMS = 4
SUPERVISION_SUMS = 8
SUPERVISION_COEFFICIENTS = 3


class Formula(NamedTuple):
    """What decides the loss of a voxel. `class_weight` is empty where classes count alike."""

    kind: str
    evidence: str
    prior: tuple[float, ...]
    class_weight: tuple[float, ...]
    official: bool

    @property
    def k(self) -> int:
        return len(self.prior)

    @property
    def below_one(self) -> bool:
        return min(self.prior) < 1


class Weights(NamedTuple):
    """What decides how the terms are joined."""

    ace: float
    kl: float
    dice: float
    dice_form: str
    include_background: bool


def number_of_sums(k: int, supervised: bool) -> int:
    return SCALAR_SUMS + 3 * k + (SUPERVISION_SUMS if supervised else 0)


def number_of_coefficients(k: int, supervised: bool) -> int:
    return 2 + 2 * k + (SUPERVISION_COEFFICIENTS if supervised else 0)


class _Voxels:
    """What both sweeps need of a piece of volume: z [K, B], the labels' masks and the concentrations."""

    def __init__(self, z: Tensor, labels: tuple[Tensor, Tensor, Tensor], formula: Formula, b: Tensor) -> None:
        k = formula.k
        label, self.counted, self.band = labels
        classes = torch.arange(k, dtype=label.dtype, device=label.device).unsqueeze(1)
        self.is_y = label == classes  # [K, B]
        # Replaced, not multiplied by 0: NaN logits in voxels that do not count must not reach the sums.
        self.z = torch.where(self.counted, z, 0.0)
        self.e = evidence_of(self.z, formula.evidence)
        self.t = torch.where(self.is_y, 0.0, self.e).sum(0)
        self.a = self.e + b
        if len(set(formula.prior)) == 1:
            self.b_y: Tensor | float = formula.prior[0]
        else:
            # A voxel that does not count has no class: any prior keeps its (unused) terms finite.
            own = torch.where(self.is_y, b, 0.0).sum(0)
            self.b_y = torch.where(own > 0, own, max(formula.prior))
        self.a_y = torch.where(self.is_y, self.e, 0.0).sum(0) + self.b_y
        self.prior_sum = sum(formula.prior)
        self.gap = self.t + (self.prior_sum - self.b_y)  # S - a_y
        self.s = self.a_y + self.gap
        self.u = self.prior_sum / self.s
        self.valid = self.counted.to(z.dtype)
        if formula.class_weight:
            w = torch.tensor(formula.class_weight, dtype=z.dtype, device=z.device).unsqueeze(1)
            self.weight = torch.where(self.is_y, w, 0.0).sum(0) * self.valid
        else:
            self.weight = self.valid
        # The KL term's concentrations: t + B, or what the published program makes of them.
        self.kl_shift = 1.0 - self.b_y if formula.official else 0.0

    def ace(self, formula: Formula) -> Tensor:
        if formula.kind == "digamma":
            return digamma_difference(self.a_y, self.gap, formula.below_one)
        if formula.kind == "log":
            return torch.log1p(self.gap / self.a_y)
        # q is 1 - p_y for the true class and p_k elsewhere: nothing cancels where the voxel is certain.
        q = torch.where(self.is_y, self.gap, self.a) / self.s
        factor = formula.k if formula.official else 1.0
        return factor * q.square().sum(0) + (q * (1 - q)).sum(0) / (self.s + 1)

    def kl(self, formula: Formula, b: Tensor) -> Tensor:
        below_one = formula.below_one
        lgamma_b = torch.lgamma(b.double()).to(b.dtype)
        wrong = torch.where(self.is_y, 0.0, kl_term(self.a, b, below_one) + lgamma_b).sum(0)
        s = self.t + (self.prior_sum + self.kl_shift)
        result = wrong - kl_term(s, self.prior_sum, below_one) - math.lgamma(self.prior_sum)
        if formula.official:
            # (1 - b_y) psi(1) - lgamma(1) + lgamma(b_y), and what is linear in 1 - b_y.
            own = torch.where(self.is_y, lgamma_b, 0.0).sum(0)
            result = result + own - self.kl_shift * (1.0 + _EULER_GAMMA)
        return result


_EULER_GAMMA = 0.5772156649015329


def sums(logits: Tensor, codes: Tensor, formula: Formula, gradient: Tensor | None = None) -> Tensor:
    """Sums of each image, (N, number_of_sums) float64; `gradient` is the magnitude (N, V) where supervised."""
    k = formula.k
    dtype = working_dtype(logits.dtype)
    z_all = flat(logits)
    out = torch.zeros(
        (logits.shape[0], number_of_sums(k, gradient is not None)), dtype=torch.float64, device=logits.device
    )
    b = torch.tensor(formula.prior, dtype=dtype, device=logits.device).unsqueeze(1)
    for image, voxels in voxel_slices(z_all, _ROWS * k):
        labels = unpack_labels(codes[image], voxels, k, gradient is not None)
        v = _Voxels(z_all[image, :, voxels].to(dtype), labels, formula, b)
        p = v.a * (v.valid / v.s)
        scalars = torch.stack((v.valid, v.weight, v.weight * v.ace(formula), v.weight * v.kl(formula, b))).sum(1)
        classes = (torch.where(v.is_y, p, 0.0).sum(1), p.sum(1), v.is_y.sum(1))
        row = [scalars.double(), *(c.double() for c in classes)]
        if gradient is not None:
            row += [_moments(v, gradient[image, voxels].to(dtype))]
        out[image] += torch.cat(row)
    return out


def _moments(v: _Voxels, g: Tensor) -> Tensor:
    """Raw moments over boundary and far voxels in float64, from centred float32 ones: raw ones would cancel."""
    on = ((v.band == BOUNDARY) & v.counted).to(g.dtype)
    far = ((v.band == FAR) & v.counted).to(g.dtype)
    n = on.sum().double()
    safe = n.clamp_min(1)
    g_on, u_on = torch.where(on > 0, g, 0.0), v.u * on
    g_mean, u_mean = (g_on.sum() / safe).to(g.dtype), (u_on.sum() / safe).to(g.dtype)
    dg, du = (g_on - g_mean) * on, u_on - u_mean * on
    g1, u1 = dg.sum().double(), du.sum().double()
    g2, gu, u2 = (dg * dg).sum().double(), (dg * du).sum().double(), (du * du).sum().double()
    gm, um = g_mean.double(), u_mean.double()
    return torch.stack(
        (
            n,
            g1 + n * gm,
            g2 + 2 * gm * g1 + n * gm * gm,
            u1 + n * um,
            gu + gm * u1 + um * g1 + n * gm * um,
            u2 + 2 * um * u1 + n * um * um,
            far.sum().double(),
            (v.u * far).sum().double(),
        )
    )


def gradient(
    logits: Tensor,
    codes: Tensor,
    coefficients: Tensor,
    formula: Formula,
    magnitude: Tensor | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """dL/dz in the logits' dtype, from the rows of `coefficients` (N, number_of_coefficients).

    Where supervised, `magnitude` is (N, V) and `means` holds (mean g, mean u) of each image's boundary, (N, 2).
    """
    k = formula.k
    dtype = working_dtype(logits.dtype)
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    z_all, out = flat(logits), flat(result)
    b = torch.tensor(formula.prior, dtype=dtype, device=logits.device).unsqueeze(1)
    for image, voxels in voxel_slices(z_all, _ROWS * k):
        labels = unpack_labels(codes[image], voxels, k, magnitude is not None)
        v = _Voxels(z_all[image, :, voxels].to(dtype), labels, formula, b)
        row = coefficients[image].to(dtype)
        c_ace, c_kl = row[0] * v.weight, row[1] * v.weight
        below_one = formula.below_one

        # KL: wrong classes only.
        s_kl = v.t + (v.prior_sum + v.kl_shift)
        kl_common = kl_term_slope(s_kl, v.prior_sum, below_one)
        da = torch.where(v.is_y, 0.0, c_kl * (kl_term_slope(v.a, b, below_one) - kl_common))

        # ACE.
        if formula.kind == "digamma":
            da += c_ace * trigamma(v.s, below_one)
            da -= torch.where(v.is_y, c_ace * trigamma(v.a_y, below_one), 0.0)
        elif formula.kind == "log":
            da += c_ace / v.s
            da -= torch.where(v.is_y, c_ace / v.a_y, 0.0)
        else:
            da += c_ace * _mse_slope(v, formula)

        # Dice, through p: dL/dp_k = [y = k] dL/dTP_k + dL/dP_k.
        c_tp, c_p = row[2 : 2 + k].unsqueeze(1), row[2 + k : 2 + 2 * k].unsqueeze(1)
        dp = torch.where(v.is_y, c_tp, 0.0) + c_p
        da += (dp - (dp * v.a).sum(0) / v.s) * (v.valid / v.s)

        if magnitude is not None and means is not None:
            c_g, c_u, c_far = row[2 + 2 * k :]
            g_mean, u_mean = means[image].to(dtype)
            on = c_g * (magnitude[image, voxels].to(dtype) - g_mean) + c_u * (v.u - u_mean)
            du = torch.where(v.band == BOUNDARY, on, torch.where(v.band == FAR, c_far, 0.0))
            da -= torch.where(v.counted, du * v.u / v.s, 0.0)

        dz = da * evidence_slope(v.z, v.e, formula.evidence)
        out[image, :, voxels] = torch.where(v.counted, dz, 0.0)
    return result


def _mse_slope(v: _Voxels, formula: Formula) -> Tensor:
    """d/da_j of F sum (y - p)^2 + sum p (1 - p) / (S + 1)."""
    factor = float(formula.k) if formula.official else 1.0
    p = v.a / v.s
    q = torch.where(v.is_y, v.gap, v.a) / v.s
    variance = (q * (1 - q)).sum(0)
    dp = 2 * factor * torch.where(v.is_y, -q, q) - 2 * p / (v.s + 1)
    return (dp - (p * dp).sum(0)) / v.s - variance / (v.s + 1).square()


class Finalised(NamedTuple):
    """From the sums: the loss, (ACE, KL, Dice loss) and the coefficients of the second sweep, all float64."""

    loss: Tensor
    terms: Tensor
    coefficients: Tensor


def finalise(totals: Tensor, formula: Formula, weights: Weights) -> Finalised:
    """Loss, terms (3,) and coefficients (2 + 2 K,) from the sums over all images (and ranks), float64."""
    k = formula.k
    number, weight_sum, ace_sum, kl_sum = totals[:SCALAR_SUMS].unbind()
    tp, p, present = totals[SCALAR_SUMS : SCALAR_SUMS + 3 * k].reshape(3, k).unbind()
    some_weight = weight_sum > 0
    scale = torch.where(some_weight, 1 / torch.where(some_weight, weight_sum, 1.0), 0.0)
    ace, kl = ace_sum * scale, kl_sum * scale

    d, d_tp, d_p = _dice(tp, p, present, number, weights.dice_form)
    share = torch.tensor(formula.class_weight or (1.0,) * k, dtype=totals.dtype, device=totals.device)
    if not weights.include_background:
        share = torch.cat((torch.zeros_like(share[:1]), share[1:]))
    share = share / share.sum().clamp_min(torch.finfo(totals.dtype).tiny)
    share = share * (number > 0)
    dice = (share * (1 - d)).sum()

    loss = weights.ace * ace + weights.kl * kl + weights.dice * dice
    coefficients = torch.cat(
        (
            torch.stack((weights.ace * scale, weights.kl * scale)),
            -weights.dice * share * d_tp,
            -weights.dice * share * d_p,
        )
    )
    return Finalised(loss, torch.stack((ace, kl, dice)), coefficients)


def _dice(tp: Tensor, p: Tensor, present: Tensor, number: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """D_k, dD_k/dTP_k and dD_k/dP_k."""
    if form == "soft":
        denominator = p + present + SOFT_DICE_EPS
        d = (2 * tp + SOFT_DICE_EPS) / denominator
        return d, 2 / denominator, -d / denominator
    tp = tp + SMOOTH_TARGET * p
    fp = p - tp
    fn = present + SMOOTH_TARGET * number - tp
    total = fp + fn + TVERSKY_EPS
    ratio = fp / total
    balance = ratio.clamp(0.2, 0.8)
    inside = ((ratio >= 0.2) & (ratio <= 0.8)).to(tp.dtype)
    denominator = tp + balance * fp + (1 - balance) * fn + TVERSKY_EPS
    d = tp / denominator
    # Through TP (which lowers FP and FN alike) and through P (which raises FP).
    balance_tp = inside * (fp - fn - TVERSKY_EPS) / total.square()
    balance_p = inside * (fn + TVERSKY_EPS) / total.square()
    d_tp = 1 / denominator - tp / denominator.square() * balance_tp * (fp - fn)
    d_p = -tp / denominator.square() * (balance_p * (fp - fn) + balance)
    return d, d_tp, d_p + SMOOTH_TARGET * d_tp
