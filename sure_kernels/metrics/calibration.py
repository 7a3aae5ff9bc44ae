"""Calibration: do probabilities say how often the model is right?

Reliability bins are `num_bins` equal parts of [0, 1 + 1e-8], each with its lower edge: an exact 1 falls in the last.
Everything but the sorted adaptive error comes from the sums of `segmentation_histograms`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.ordering import order_bits
from sure_kernels.metrics.detection import Bounded
from sure_kernels.metrics.histograms import (
    ONLY_LOSS,
    Columns,
    PooledHistograms,
    Segmentation,
    binned,
    columns,
    histograms_of,
)
from sure_kernels.metrics.undefined import Scored, Undefined, answer, scored
from sure_kernels.ops.histograms.closed_form import Refined, magnitude_bin, refine
from sure_kernels.ops.histograms.reference import magnitude_edges
from sure_kernels.validation import check_bool, check_choice


class Reliability(NamedTuple):
    """A reliability curve, one entry per bin; NaN means in bins that are empty."""

    confidence: Tensor
    """Mean predicted probability."""
    accuracy: Tensor
    """Share of voxels where the prediction (per class: the class) is true."""
    voxels: Tensor
    """How many voxels fall in the bin."""


def reliability_curve(
    probability: Tensor,
    target: Tensor,
    *,
    num_bins: int = 10,
    per_class: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_reason: bool = False,
) -> Any:
    """Mean confidence, accuracy and voxels per confidence bin.

    Args:
        probability: (N, K, *spatial) floating point in [0, 1], summing to 1 over K.
        target: integer labels (N, *spatial) or (N, 1, *spatial), or one-hot (N, K, *spatial).
        num_bins: how many equal bins.
        per_class: False looks at the most probable class of each voxel (top label); True at every class on
            its own, as a question of yes or no.
        mask: boolean (N, *spatial) or (N, 1, *spatial) (0/1 numbers accepted), True = counts.
        ignore_index: label of voxels that don't count.
        return_reason: also return, per bin, why the means are NaN, see `Undefined`.

    Returns:
        Reliability of float64 tensors (N, num_bins), or (N, K, num_bins) where per_class.

    Raises:
        TypeError: dtypes. ValueError: shapes, labels or probabilities out of range, a mask that is not 0/1.
    """
    check_bool(per_class, "per_class")
    segmentation = Segmentation.checked(probability, target, mask, ignore_index)
    sums = histograms_of(segmentation, binned(per_class), num_bins)
    return answer(curve_of(columns(sums, per_class)), return_reason)


def expected_calibration_error(
    probability: Tensor,
    target: Tensor,
    *,
    num_bins: int = 10,
    per_class: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_reason: bool = False,
) -> Any:
    """ECE: the mean over voxels of |mean confidence - accuracy| of the voxel's bin (Guo et al., ICML 2017).

    Arguments and errors as for `reliability_curve`.

    Returns:
        float64 (N,), or (N, K) where per_class; NaN where no voxel counts or a counted probability is NaN.
    """
    check_bool(per_class, "per_class")
    segmentation = Segmentation.checked(probability, target, mask, ignore_index)
    sums = histograms_of(segmentation, binned(per_class), num_bins)
    return answer(ece_of(columns(sums, per_class)), return_reason)


def adaptive_calibration_error(
    probability: Tensor,
    target: Tensor,
    *,
    num_bins: int = 10,
    per_class: bool = False,
    method: Literal["exact", "histogram"] = "exact",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_reason: bool = False,
) -> Any:
    """ACE: the calibration error over ranges that hold equally many voxels (Nixon et al., CVPR workshops 2019).

    Voxels are sorted by confidence and cut into num_bins ranges of n / num_bins voxels each, a voxel on a cut counting
    on both sides in parts; voxels of equal confidence share their hits evenly, so that their order does not matter. ACE
    is the mean over ranges of |mean confidence - accuracy|. Nixon et al. average it over the classes.

    Arguments and errors as for `reliability_curve`, and

        method: "exact" sorts every case; "histogram" needs one pass and constant memory.

    Returns:
        float64 (N,), or (N, K) where per_class; NaN where no voxel counts or a counted probability is NaN. Of
        "histogram", Bounded(value, bound) of two such tensors.
    """
    check_bool(per_class, "per_class")
    exact = check_choice(method, "method", ("exact", "histogram")) == "exact"
    segmentation = Segmentation.checked(probability, target, mask, ignore_index)
    sums = columns(histograms_of(segmentation, binned(per_class, magnitudes=True), num_bins), per_class)
    result = _refined_ace(segmentation, sums, num_bins, per_class) if exact else ace_of(sums, num_bins)
    return answer(result, return_reason)


def brier_score(
    probability: Tensor,
    target: Tensor,
    *,
    per_class: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_reason: bool = False,
) -> Any:
    """Brier score: the mean over voxels of sum_k (p_k - y_k)^2, y the one-hot label; 0 is best, 2 worst.

    Arguments and errors as for `reliability_curve`; per_class gives the classes' shares, which add up to it.

    Returns:
        float64 (N,), or (N, K) where per_class; NaN where no voxel counts or a counted probability is NaN.
    """
    check_bool(per_class, "per_class")
    sums = histograms_of(Segmentation.checked(probability, target, mask, ignore_index), ONLY_LOSS)
    return answer(brier_of(columns(sums, per_class)), return_reason)


def negative_log_likelihood(
    probability: Tensor,
    target: Tensor,
    *,
    per_class: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_reason: bool = False,
) -> Any:
    """NLL: the mean over voxels of -ln p_y in nats, y the label; infinite where a true class has probability 0.

    Arguments and errors as for `reliability_curve`; per_class takes the mean over the voxels of each class.

    Returns:
        float64 (N,), or (N, K) where per_class; NaN where no voxel (of the class) counts or a counted probability is
        NaN.
    """
    check_bool(per_class, "per_class")
    sums = histograms_of(Segmentation.checked(probability, target, mask, ignore_index), ONLY_LOSS)
    return answer(nll_of(columns(sums, per_class), per_class), return_reason)


class ReliabilityCurve(PooledHistograms):
    """`reliability_curve` over all voxels seen: `compute` gives a Reliability without the axis N.

    `num_classes=None` looks at the top label, a number at each class on its own.
    """

    needs = ("reliability",)

    def _scored(self, sums: Columns) -> tuple[Reliability, Tensor]:
        return curve_of(sums)


class ExpectedCalibrationError(PooledHistograms):
    """`expected_calibration_error` over all voxels seen: `compute` is 0-d, or (K,) with `num_classes`."""

    needs = ("reliability",)

    def _scored(self, sums: Columns) -> Scored:
        return ece_of(sums)


class AdaptiveCalibrationError(PooledHistograms):
    """`adaptive_calibration_error` over all voxels seen: `compute` is a Bounded, 0-d or (K,) with `num_classes`."""

    needs = ("confidence",)

    def _scored(self, sums: Columns) -> tuple[Bounded, Tensor]:
        return ace_of(sums, self._num_bins)


class BrierScore(PooledHistograms):
    """`brier_score` over all voxels seen: `compute` is 0-d, or (K,) with `num_classes`."""

    needs = ("loss",)

    def __init__(self, *, num_classes: int | None = None) -> None:
        super().__init__(num_bins=1, num_classes=num_classes)

    def _scored(self, sums: Columns) -> Scored:
        return brier_of(sums)


class NegativeLogLikelihood(BrierScore):
    """`negative_log_likelihood` over all voxels seen: `compute` is 0-d, or (K,) with `num_classes`."""

    def _scored(self, sums: Columns) -> Scored:
        return nll_of(sums, self._num_classes is not None)


# From the sums of `columns`, of any leading shape, to metrics


def _mean(total: Tensor, voxels: Tensor, undefined: Tensor, none: Undefined = Undefined.NO_VOXEL) -> Scored:
    return scored(total / voxels, (Undefined.NAN_INPUT, undefined > 0), (none, voxels == 0))


def curve_of(sums: Columns) -> tuple[Reliability, Tensor]:
    confidence, hits, voxels = sums.reliability.unbind(-2)
    undefined = sums.undefined[..., :1].expand_as(voxels)
    mean, reason = _mean(confidence, voxels, undefined)
    return Reliability(mean, _mean(hits, voxels, undefined).value, voxels), reason


def ece_of(sums: Columns) -> Scored:
    """sum_b n_b/n |mean confidence - accuracy| = sum_b |difference of the sums| / n."""
    confidence, hits, voxels = sums.reliability.unbind(-2)
    return _mean((confidence - hits).abs().sum(-1), voxels.sum(-1), sums.undefined[..., 0])


def brier_of(sums: Columns) -> Scored:
    squares, _, _, voxels = sums.loss.unbind(-1)
    return _mean(squares, voxels, sums.undefined[..., 0])


def nll_of(sums: Columns, per_class: bool) -> Scored:
    _, log_loss, voxels, _ = sums.loss.unbind(-1)
    none = Undefined.CLASS_ABSENT if per_class else Undefined.NO_VOXEL
    return _mean(log_loss, voxels, sums.undefined[..., 0], none)


def ace_of(sums: Columns, num_bins: int) -> tuple[Bounded, Tensor]:
    edges = magnitude_edges().to(sums.confidence.device)
    middle, half_width = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    misses, hits = sums.confidence.double().unbind(-2)
    mass = misses + hits
    cuts = _Cuts(mass, num_bins)
    spread = (mass * half_width).sum(-1) + cuts.uncertain_hits(hits)
    voxels, undefined = mass.sum(-1), sums.undefined[..., 0]
    value, reason = _mean(cuts.gaps(middle.expand_as(mass), hits), voxels, undefined)
    return Bounded(value, _mean(spread, voxels, undefined).value), reason


def _refined_ace(segmentation: Segmentation, sums: Columns, num_bins: int, per_class: bool) -> Scored:
    """The exact error: bins that a cut goes through are replaced by the distinct confidences in them.

    A second pass finds those, and the mean confidence of every other bin; nothing but what lies in the bins of the
    num_bins - 1 cuts is sorted.
    """
    misses, hits = (t if per_class else t[:, None] for t in sums.confidence.double().unbind(-2))
    mass = misses + hits
    wanted = _Cuts(mass, num_bins).through()
    gaps = [
        torch.stack([_gaps(*t, num_bins) for t in zip(mass[n], hits[n], wanted[n], looks, strict=True)])
        for n, looks in enumerate(refine(*segmentation, wanted, not per_class))
    ]
    value, voxels = torch.stack(gaps), mass.sum(-1)
    if not per_class:
        value, voxels = value[:, 0], voxels[:, 0]
    return _mean(value, voxels, sums.undefined[..., 0])


def _gaps(mass: Tensor, hits: Tensor, wanted: Tensor, look: Refined, num_bins: int) -> Tensor:
    """Sum of the gaps of one question, from its bins (2 HALF,) and what was found in those that are wanted."""
    whole = (mass > 0) & ~wanted
    order = order_bits(look.confidence).sort().indices
    ordered = look.confidence[order]
    values, place, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    shared = torch.zeros(len(values), dtype=torch.float64, device=mass.device)
    shared.index_add_(0, place, look.hit[order].double())
    # Distinct values already ascend within their bin.
    ascending = torch.cat([whole.nonzero()[:, 0], magnitude_bin(values).long()]).sort(stable=True).indices
    if not len(ascending):
        return mass.sum()

    def merged(of_bins: Tensor, of_values: Tensor) -> Tensor:
        return torch.cat([of_bins[whole], of_values.double()])[ascending]

    confidence = merged(look.sums / mass.clamp_min(1), values)
    return _Cuts(merged(mass, counts), num_bins).gaps(confidence, merged(hits, shared))


class _Cuts:
    """Bins (..., B) of `mass` voxels each, in ascending order, cut into ranges of equal mass."""

    def __init__(self, mass: Tensor, num_bins: int) -> None:
        self.mass, self.end = mass, mass.cumsum(-1)
        steps = torch.arange(num_bins + 1, dtype=torch.float64, device=mass.device)
        self.cut = self.end[..., -1:] * steps / num_bins  # (..., num_bins + 1)
        self.bin = torch.searchsorted(self.end, self.cut).clamp_max(mass.shape[-1] - 1)
        self.taken = self.cut - (self.end - mass).gather(-1, self.bin)  # of the bin of the cut, below it

    def through(self) -> Tensor:
        """(..., B): whether a cut goes through the inside of the bin."""
        inside = (self.taken > 0) & (self.taken < self.mass.gather(-1, self.bin))
        return torch.zeros_like(self.mass).scatter_add_(-1, self.bin, inside.double()) > 0

    def gaps(self, confidence: Tensor, hits: Tensor) -> Tensor:
        """Sum over ranges of |sum of confidence - hits|, a bin giving its hits and its mean confidence evenly."""
        excess = self.mass * confidence - hits
        below = (excess.cumsum(-1) - excess).gather(-1, self.bin)
        share = excess / self.mass.clamp_min(1)
        return (below + self.taken * share.gather(-1, self.bin)).diff(dim=-1).abs().sum(-1)

    def uncertain_hits(self, hits: Tensor) -> Tensor:
        """By how much the hits of the ranges may differ, added up, as a bin that is cut may hold them anywhere."""
        end = self.end.gather(-1, self.bin)
        first = torch.minimum(end[..., :-1], self.cut[..., 1:]) - self.cut[..., :-1]
        last = self.taken[..., 1:].where(self.bin[..., 1:] > self.bin[..., :-1], 0)
        mass, hits = self.mass.gather(-1, self.bin), hits.gather(-1, self.bin)

        def uncertain(part: Tensor, mass: Tensor, hits: Tensor) -> Tensor:
            even = hits * part / mass.clamp_min(1)
            fewest, most = (hits - (mass - part)).clamp_min(0), torch.minimum(hits, part)
            return torch.maximum(even - fewest, most - even).sum(-1)

        return uncertain(first, mass[..., :-1], hits[..., :-1]) + uncertain(last, mass[..., 1:], hits[..., 1:])
