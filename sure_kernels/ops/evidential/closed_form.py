"""The evidential loss, optionally with its supervision, as two sweeps over the logits.

`sums` makes one row of running sums per image; from these `finalise` gets the loss, its terms and one row of
coefficients per image; `gradient` turns the coefficients into dL/dz, recomputing from the logits what it needs.
Between the sweeps nothing of full size is kept but the logits and one small integer a voxel.

Per voxel with label y, e = act(z), a = e + b, S = sum a, B = sum b, t = sum of e over the wrong classes:

    digamma ACE = psi(S) - psi(a_y)                 S - a_y = t + B - b_y, so the logarithms never cancel
    KL          = sum over wrong k of D(a_k, b_k) - D(t + B, B)
                  with D(x, c) = (x - c) psi(x) - lgamma(x) + lgamma(c) - (x - c)
    vacuity u   = B / S

Sums of an image, in this order: counted voxels, their weights, weighted ACE, weighted KL, then per class
TP_k = sum [y = k] p_k, P_k = sum p_k, N_k = #[y = k], then the supervision's (number, g, g^2, u, ug, u^2) over
boundary voxels and (number, u) over far ones. Coefficients: ACE, KL, then per class dL/dTP_k, dL/dP_k, then
(c_g, c_u, c_far) with dL/du = c_g (g - mean g) + c_u (u - mean u) on the boundary and c_far far away; the means
come beside them, since an upstream gradient scales the coefficients but not the means.

`sums_of` and `gradient_of` are the formulas for a piece of volume; the compiled backend fuses the same functions. They
take one tensor a class, so that nothing needs a class axis, and masks are numbers: torch compares and selects several
times more slowly than it multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import flat, voxel_slices, working_dtype
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR, code_for, unpack_band, unpack_labels
from sure_kernels.kernel_lib.special import (
    Concentration,
    Number,
    compiling,
    concentration,
    digamma_difference,
    evidence_slope,
    kl_share,
    kl_slope,
    slope_of_sum,
    trigamma,
)
from sure_kernels.kernel_lib.special import evidence as evidence_of
from sure_kernels.ops.evidential.reference import SMOOTH_TARGET, SOFT_DICE_EPS, TVERSKY_EPS

SCALAR_SUMS = 4
SUPERVISION_SUMS = 8
SUPERVISION_COEFFICIENTS = 3
_EULER_GAMMA = 0.5772156649015329


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

    @property
    def uniform(self) -> bool:
        return len(set(self.prior)) == 1


class Weights(NamedTuple):
    """What decides how the terms are joined."""

    ace: float
    kl: float
    dice: float
    dice_form: str
    include_background: bool


class Constants(NamedTuple):
    """A formula's numbers: Python's own, or 0-d tensors where they must not be part of the compiled code.

    `total` belongs to the sum of the priors; `weight` is None where classes count alike. What follows from the priors
    stands here for the compiled code too: the properties of `Formula` mean nothing to torch.compile before torch 2.9.
    """

    prior: Sequence[Concentration]
    total: Concentration
    weight: Sequence[Number] | None
    below_one: bool
    uniform: bool


def constants_of(formula: Formula) -> Constants:
    *prior, total = (concentration(b, formula.below_one) for b in (*formula.prior, sum(formula.prior)))
    return Constants(prior, total, formula.class_weight or None, formula.below_one, formula.uniform)


class Piece(NamedTuple):
    """A piece of one image, every tensor of shape [B].

    z: logits of each class, in the dtype that is computed in. label: numbers that equal a class where it is the
    voxel's. valid: 1 where a voxel counts, else 0. all_count: whether that is known to be everywhere.
    """

    z: Sequence[Tensor]
    label: Tensor
    valid: Tensor
    all_count: bool


class Supervised(NamedTuple):
    """What supervision reads of a piece: gradient magnitude, and the band (0 where a voxel does not count)."""

    magnitude: Tensor
    band: Tensor


def number_of_sums(k: int, supervised: bool) -> int:
    return SCALAR_SUMS + 3 * k + (SUPERVISION_SUMS if supervised else 0)


def number_of_coefficients(k: int, supervised: bool) -> int:
    return 2 + 2 * k + (SUPERVISION_COEFFICIENTS if supervised else 0)


def _without(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask is 0, exactly 0 where it is 1."""
    return torch.addcmul(x, mask, x, value=-1)


def _where_equal(x: Tensor, value: int, dtype: torch.dtype) -> Tensor:
    """1 where x equals `value`, else 0."""
    # In place the comparison of numbers stays among numbers, which is four times faster than by way of a boolean.
    return x.clone().eq_(value) if x.dtype == dtype else (x == value).to(dtype)


def _chosen(masks: Sequence[Tensor], numbers: Sequence[Number]) -> Tensor:
    """The number of the class whose mask is 1; 0 where none is."""
    result = masks[0] * numbers[0]
    for mask, number in zip(masks[1:], numbers[1:], strict=True):
        result = result + mask * number
    return result


class _Voxels:
    """What both sweeps need of a piece of volume."""

    def __init__(self, piece: Piece, formula: Formula, c: Constants) -> None:
        self.valid = piece.valid
        self.prior, self.prior_sum = [b.value for b in c.prior], c.total.value
        if piece.all_count:
            self.z = list(piece.z)
        else:
            # Replaced, not multiplied by 0: NaN logits in voxels that do not count must not reach the sums.
            counted = piece.valid > 0
            self.z = [torch.where(counted, z, 0.0) for z in piece.z]
        self.is_y = [_where_equal(piece.label, k, piece.valid.dtype) for k in range(len(c.prior))]
        self.e = [evidence_of(z, formula.evidence) for z in self.z]
        self.a = [e + b for e, b in zip(self.e, self.prior, strict=True)]
        self.t = _without(self.e[0], self.is_y[0])
        own = self.is_y[0] * self.e[0]
        for is_y, e in zip(self.is_y[1:], self.e[1:], strict=True):
            self.t += _without(e, is_y)
            own.addcmul_(is_y, e)
        if c.uniform:
            self.b_y: Number = self.prior[0]
        else:
            # A voxel without a class gets a prior too: it keeps terms that are not used finite.
            known = sum(self.is_y[1:], self.is_y[0])
            self.b_y = _chosen(self.is_y, self.prior) + (1 - known) * self.prior_sum
        self.a_y = own + self.b_y
        self.gap = self.t + (self.prior_sum - self.b_y)  # S - a_y
        self.s = self.a_y + self.gap
        self.inverse = self.s.reciprocal()
        self.weight = self.valid if c.weight is None else _chosen(self.is_y, c.weight) * self.valid
        # The KL term's evidence: t, or what the published program makes of it.
        self.kl_shift: Number = 1.0 - self.b_y if formula.official else 0.0
        self.t_kl = self.t + self.kl_shift
        self.error_factor = float(len(c.prior)) if formula.official else 1.0

    def squares(self) -> Tensor:
        """The sum of a^2 over the wrong classes."""
        terms = [_without(a.square(), is_y) for a, is_y in zip(self.a, self.is_y, strict=True)]
        return sum(terms[1:], terms[0])

    def ace(self, formula: Formula, c: Constants) -> Tensor:
        if formula.kind == "digamma":
            return digamma_difference(self.a_y, self.gap, c.below_one)
        if formula.kind == "log":
            return torch.log1p(self.gap / self.a_y)
        # q is 1 - p_y for the true class and p_k elsewhere; sum q = 2 gap / S. Nothing cancels in a certain voxel.
        q_y = self.gap * self.inverse
        q_square = q_y.square() + self.squares() * self.inverse.square()
        return self.error_factor * q_square + (2 * q_y - q_square) / (self.s + 1)

    def kl(self, formula: Formula, c: Constants) -> Tensor:
        result = -kl_share(self.t_kl, c.total, c.below_one)
        for e, is_y, b in zip(self.e, self.is_y, c.prior, strict=True):
            result += _without(kl_share(e, b, c.below_one), is_y)
        if formula.official:
            # (1 - b_y) psi(1) - lgamma(1) + lgamma(b_y), and what is linear in 1 - b_y.
            own = _chosen(self.is_y, [b.lgamma for b in c.prior])
            result = result + own - self.kl_shift * (1.0 + _EULER_GAMMA)
        return result


def _total(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum of x, weighted where there is a weight."""
    # Not torch.dot: it starts a team of threads for every piece, however small.
    product = x if weight is None else x * weight
    return product.sum(dtype=torch.float64 if compiling() else None)


def sums_of(piece: Piece, supervised: Supervised | None, formula: Formula, c: Constants) -> list[Tensor]:
    """The columns of `sums`, of a piece; the supervision's are float64."""
    v = _Voxels(piece, formula, c)
    columns = [
        _total(v.valid),
        _total(v.weight),
        _total(v.ace(formula, c), v.weight),
        _total(v.kl(formula, c), v.weight),
    ]
    inverse = v.inverse * v.valid
    p_y = v.a_y * inverse
    columns += [_total(p_y, is_y) for is_y in v.is_y]
    columns += [_total(a, inverse) for a in v.a]
    columns += [_total(is_y) for is_y in v.is_y]
    if supervised is not None:
        columns += _moments(v.inverse * v.prior_sum, supervised)
    return columns


def _moments(u: Tensor, supervised: Supervised) -> list[Tensor]:
    """Raw moments over boundary voxels, and the number and sum of u over far ones, in float64: raw moments cancel."""
    g, band = supervised
    on, far = band == BOUNDARY, _where_equal(band, FAR, u.dtype)
    if not compiling():
        g_on, u_on = g[on].double(), u[on].double()
        number = g_on.new_full((), g_on.numel())
    else:
        g_on, u_on = torch.where(on, g, 0.0).double(), torch.where(on, u, 0.0).double()
        number = _total(on.to(u.dtype)).double()
    products = [_total(x, y) for x, y in ((g_on, g_on), (u_on, g_on), (u_on, u_on))]
    return [
        *(number, _total(g_on), products[0], _total(u_on), products[1], products[2]),
        *(_total(far).double(), _total(far, u).double()),
    ]


def gradient_of(
    piece: Piece,
    supervised: Supervised | None,
    coefficients: Tensor,
    means: Tensor | None,
    formula: Formula,
    c: Constants,
) -> list[Tensor]:
    """dL/dz of each class of a piece, from one image's row of coefficients and its means."""
    k, below_one = len(c.prior), c.below_one
    v = _Voxels(piece, formula, c)
    row = coefficients.unbind()
    c_tp, c_p = row[2 : 2 + k], row[2 + k : 2 + 2 * k]
    # Without weights the voxels that do not count are left out once, at the end.
    w_ace, w_kl = (row[0], row[1]) if c.weight is None else (row[0] * v.weight, row[1] * v.weight)

    # Dice, through p: dL/dp_k = [y = k] dL/dTP_k + dL/dP_k.
    dp_own = _chosen(v.is_y, c_tp)
    dp_a = dp_own * v.a_y
    for a, c_k in zip(v.a, c_p, strict=True):
        dp_a.addcmul_(a, c_k)
    da_all = -dp_a * v.inverse.square()
    da_own = dp_own * v.inverse
    of_sum = slope_of_sum(v.t_kl, v.prior_sum, below_one)
    per_a: Tensor | None = None
    if formula.kind == "digamma":
        da_all = da_all + w_ace * trigamma(v.s, below_one)
        da_own = da_own - w_ace * trigamma(v.a_y, below_one)
    elif formula.kind == "log":
        da_all = da_all + w_ace * v.inverse
        da_own = da_own - w_ace / v.a_y
    else:
        # By p_k: 2 F (p_k, or -q_y for the true class) - 2 p_k / (S + 1).
        following = (v.s + 1).reciprocal()
        q_y, p_y, wrong_square = v.gap * v.inverse, v.a_y * v.inverse, v.squares() * v.inverse.square()
        variance = 2 * q_y - (q_y.square() + wrong_square)
        dp_y = -2 * (v.error_factor * q_y + p_y * following)
        dp_wrong = 2 * (v.error_factor - following)
        mean_dp = p_y * dp_y + wrong_square * dp_wrong
        da_all = da_all - w_ace * (mean_dp * v.inverse + variance * following.square())
        da_own = da_own + w_ace * dp_y * v.inverse
        per_a = w_ace * dp_wrong * v.inverse.square()

    if supervised is not None and means is not None:
        c_g, c_u, c_far = row[2 + 2 * k :]
        u = v.inverse * v.prior_sum
        on, far = (_where_equal(supervised.band, where, u.dtype) for where in (BOUNDARY, FAR))
        g = _finite_off(supervised.magnitude, on)
        du = on * (c_g * (g - means[0]) + c_u * (u - means[1])) + far * c_far
        da_all = da_all - du * u * v.inverse

    result = []
    for z, e, a, b, is_y, c_k in zip(v.z, v.e, v.a, v.prior, v.is_y, c_p, strict=True):
        wrong = kl_slope(e, b, of_sum, below_one).mul_(w_kl)
        if per_a is not None:
            wrong.addcmul_(per_a, a)
        da = _without(wrong, is_y).addcmul_(is_y, da_own).add_(da_all).addcmul_(v.inverse, c_k)
        da.mul_(evidence_slope(z, e, formula.evidence))
        result.append(da if piece.all_count else da.mul_(v.valid))
    return result


def _finite_off(g: Tensor, on: Tensor) -> Tensor:
    """g, of which only voxels that are `on` count: finite elsewhere, as 0 times NaN is NaN."""
    if not compiling() and g.device.type == "cpu" and bool(g.sum().isfinite()):
        return g
    return torch.where(on != 0, g, 0.0)


def _read(z: Tensor, codes: Tensor, voxels: slice, formula: Formula, banded: bool) -> Piece:
    """A piece of one image: logits (K, V), codes of its voxels."""
    dtype = working_dtype(z.dtype)
    label = unpack_labels(codes, voxels, formula.k, banded)
    ignored = code_for(formula.k, banded).ignored
    # On a GPU looking would cost more than masking.
    all_count = z.device.type == "cpu" and int(label.max()) < ignored
    label = label.to(dtype)
    valid = torch.ones_like(label) if all_count else (label < ignored).to(dtype)
    return Piece([c[voxels].to(dtype) for c in z], label, valid, all_count)


def _supervised(
    magnitude: Tensor | None, codes: Tensor, voxels: slice, k: int, dtype: torch.dtype
) -> Supervised | None:
    if magnitude is None:
        return None
    return Supervised(magnitude[voxels].to(dtype), unpack_band(codes, voxels, k).to(dtype))


def sums(logits: Tensor, codes: Tensor, formula: Formula, gradient: Tensor | None = None) -> Tensor:
    """Sums of each image, (N, number_of_sums) float64; `gradient` is the magnitude (N, V) where supervised."""
    supervised = gradient is not None
    columns = number_of_sums(formula.k, supervised)
    out = torch.zeros((logits.shape[0], columns), dtype=torch.float64, device=logits.device)
    z, c, dtype = flat(logits), constants_of(formula), working_dtype(logits.dtype)
    for image, voxels in voxel_slices(z):
        piece = _read(z[image], codes[image], voxels, formula, supervised)
        g = _supervised(None if gradient is None else gradient[image], codes[image], voxels, formula.k, dtype)
        row = sums_of(piece, g, formula, c)
        out[image] += torch.stack([x.double() for x in row])
    return out


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
    supervised = magnitude is not None
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    z, out, c, dtype = flat(logits), flat(result), constants_of(formula), working_dtype(logits.dtype)
    coefficients = coefficients.to(dtype)
    means = None if means is None else means.to(dtype)
    for image, voxels in voxel_slices(z):
        piece = _read(z[image], codes[image], voxels, formula, supervised)
        g = _supervised(None if magnitude is None else magnitude[image], codes[image], voxels, formula.k, dtype)
        centre = None if means is None else means[image]
        for k, dz in enumerate(gradient_of(piece, g, coefficients[image], centre, formula, c)):
            out[image, k, voxels] = dz
    return result


class Finalised(NamedTuple):
    """From the sums: the loss, (ACE, KL, Dice loss) and the coefficients of the second sweep, all float64."""

    loss: Tensor
    terms: Tensor
    coefficients: Tensor


def finalise(totals: Tensor, formula: Formula, weights: Weights) -> Finalised:
    """Loss, terms (3,) and coefficients (2 + 2 K,) from the sums over all images (and ranks), float64."""
    k = len(formula.prior)
    number, weight_sum, ace_sum, kl_sum = totals[:SCALAR_SUMS].unbind()
    tp, p, present = totals[SCALAR_SUMS : SCALAR_SUMS + 3 * k].reshape(3, k).unbind()
    some_weight = weight_sum > 0
    scale = torch.where(some_weight, 1 / torch.where(some_weight, weight_sum, 1.0), 0.0)
    ace, kl = ace_sum * scale, kl_sum * scale

    d, d_tp, d_p = _dice(tp, p, present, number, weights.dice_form)
    share = totals.new_tensor(formula.class_weight) if formula.class_weight else totals.new_ones(k)
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
