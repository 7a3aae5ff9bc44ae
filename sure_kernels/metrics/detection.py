"""Does uncertainty find the errors? Ranking of voxels by uncertainty against where the prediction is wrong.

With voxels in bins of the uncertainty, w_b of them wrong and c_b right, from the most to the least uncertain:

    AUROC = sum_b w_b (C_after + c_b / 2) / (W C)
    AUPRC = sum_b w_b P_b / W                  P_b the precision in bin b
    AURC  = 1/n sum_i risk(i)                  risk(i) the share of errors among the i most certain voxels

"exact" has one bin for each distinct uncertainty: ties count half (AUROC), share the precision at their end (AUPRC, as
scikit-learn), or come in random order, on average (AURC). "histogram" has fine bins, fixed beforehand: how the voxels
of a bin are ordered is not known, the value takes them as mixed evenly, and the bound is what any order could change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sure_kernels.backends import dispatch
from sure_kernels.kernel_lib.ordering import order_bits
from sure_kernels.metrics.histograms import MOST_CLASSES
from sure_kernels.metrics.points import as_points, match_boolean, match_kinds, rows
from sure_kernels.metrics.state import SumState
from sure_kernels.metrics.undefined import Scored, Undefined, answer, scored
from sure_kernels.ops.histograms import op
from sure_kernels.ops.histograms.reference import BINS
from sure_kernels.validation import check_choice, check_count

Method = Literal["exact", "histogram"]


class Bounded(NamedTuple):
    """A value from histograms: the exact one differs from it by `bound` at most (and float64 rounding)."""

    value: Tensor
    bound: Tensor


def error_detection_auroc(
    uncertainty: Tensor,
    error: Tensor,
    *,
    mask: Tensor | None = None,
    method: Method | None = None,
    return_reason: bool = False,
) -> Any:
    """AUROC: the probability that a wrong voxel is more uncertain than a right one, ties counting half.

    Args:
        uncertainty: maps (N, 1, *spatial), sets of points (N, n) or one set (n,); floating point. The histogram's bins
            suit values in [0, 1], however skewed; those outside share the two end bins.
        error: boolean (0/1 numbers accepted), True = wrong; the shape of uncertainty, maps also (N, *spatial), or
            (N, C, *spatial) for C kinds of error at once, for example one a class.
        mask: boolean, True = counts; the shape of uncertainty, maps also (N, *spatial).
        method: "exact" sorts, in O(n log n) time and O(n) memory; "histogram" takes one pass and constant memory.
            By default "histogram" for maps and "exact" for sets of points.
        return_reason: also return why it is NaN, see `Undefined`.

    Returns:
        "exact": float64 (N,), (N, C) for C kinds of error, 0-d for one set; NaN where nothing or everything that
        counts is wrong, and where a counted uncertainty is NaN. "histogram": Bounded(value, bound) of two such tensors.

    Raises:
        TypeError: dtype of uncertainty. ValueError: shapes that differ, an error or mask that is not 0/1.
    """
    return _detect(auroc, uncertainty, error, mask, method, return_reason)


def error_detection_auprc(
    uncertainty: Tensor,
    error: Tensor,
    *,
    mask: Tensor | None = None,
    method: Method | None = None,
    return_reason: bool = False,
) -> Any:
    """AUPRC: average precision of finding the wrong voxels by their uncertainty (a step function, not interpolated).

    Arguments, errors and result as of `error_detection_auroc`; undefined only where nothing is wrong.
    """
    return _detect(auprc, uncertainty, error, mask, method, return_reason)


def area_under_risk_coverage(
    uncertainty: Tensor,
    error: Tensor,
    *,
    mask: Tensor | None = None,
    method: Method | None = None,
    return_reason: bool = False,
) -> Any:
    """AURC: the error rate of the i most certain voxels, averaged over i = 1 ... n (Geifman, El-Yaniv, NeurIPS 2017).

    Arguments, errors and result as of `error_detection_auroc`; 0 is best, and it is undefined only where nothing
    counts.
    """
    return _detect(aurc, uncertainty, error, mask, method, return_reason)


class Points(NamedTuple):
    """Checked arguments: uncertainty (N, V), error (N, C, V), and which points count (N, V), None for all."""

    uncertainty: Tensor
    error: Tensor
    counted: Tensor | None
    single: bool
    """Whether they came as one set (n,)."""
    many: bool
    """Whether results have the axis C."""

    def shaped(self, result: Tensor) -> Tensor:
        """(N, C) as the caller's arguments call for."""
        result = result if self.many else result[:, 0]
        return result[0] if self.single else result

    def histograms(self) -> tuple[Tensor, Tensor]:
        """(N, C, 2, BINS) where right and where wrong, and counted NaN (N,)."""
        # One channel, whatever the number of points.
        backend = dispatch(self.uncertainty.unsqueeze(1), "segmentation_histograms")
        return op.binary_histogram(self.uncertainty, self.error, self.counted, backend)


def check_points(uncertainty: object, error: object, mask: object) -> Points:
    u = as_points(uncertainty, "uncertainty")
    wrong = match_kinds(error, "error", u, "uncertainty")
    counted = None if mask is None else match_boolean(mask, "mask", u, "uncertainty")
    return Points(rows(u).detach(), wrong, counted, u.ndim == 1, wrong.shape[1] > 1)


class PooledErrors(SumState):
    """Fine histograms of the uncertainty over all voxels seen, where right and where wrong."""

    def __init__(self, *, num_classes: int | None = None) -> None:
        self._kinds = None if num_classes is None else check_count(num_classes, "num_classes", maximum=MOST_CLASSES)
        leading = () if self._kinds is None else (self._kinds,)
        super().__init__(errors=(*leading, 2, BINS), undefined=())

    def update(self, uncertainty: Tensor, error: Tensor, *, mask: Tensor | None = None) -> None:
        """Add a batch; arguments and errors of the function of the same name."""
        points = check_points(uncertainty, error, mask)
        kinds = points.error.shape[1]
        if kinds != (self._kinds or 1):
            raise ValueError(f"error: expected {self._kinds or 1} kinds of error, got {kinds}")
        errors, undefined = points.histograms()
        errors = errors.sum(0)
        self._add(errors=errors[0] if self._kinds is None else errors, undefined=undefined.sum())

    def _result(self, **sums: Tensor) -> Any:
        return self._scored(sums["errors"], sums["undefined"])

    def _scored(self, errors: Tensor, undefined: Tensor) -> Any:
        """Result and reason from histograms (..., 2, BINS) and the number of NaN."""
        raise NotImplementedError


class ErrorDetectionAUROC(PooledErrors):
    """`error_detection_auroc` over all voxels seen: `compute` is a Bounded, 0-d or (C,) with `num_classes`."""

    def _scored(self, errors: Tensor, undefined: Tensor) -> tuple[Bounded, Tensor]:
        return from_histograms(auroc, errors, undefined)


class ErrorDetectionAUPRC(PooledErrors):
    """`error_detection_auprc` over all voxels seen: `compute` is a Bounded, 0-d or (C,) with `num_classes`."""

    def _scored(self, errors: Tensor, undefined: Tensor) -> tuple[Bounded, Tensor]:
        return from_histograms(auprc, errors, undefined)


class AreaUnderRiskCoverage(PooledErrors):
    """`area_under_risk_coverage` over all voxels seen: `compute` is a Bounded, 0-d or (C,) with `num_classes`."""

    def _scored(self, errors: Tensor, undefined: Tensor) -> tuple[Bounded, Tensor]:
        return from_histograms(aurc, errors, undefined)


class Ranked(NamedTuple):
    """Voxels in bins from the most to the least uncertain: float64 (..., B)."""

    wrong: Tensor
    right: Tensor
    tied: bool
    """Whether the voxels of a bin are tied; otherwise they are mixed in an unknown order."""

    def before(self, x: Tensor) -> Tensor:
        return x.cumsum(-1) - x

    def after(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) - x.cumsum(-1)


Statistic = Callable[[Ranked], tuple[Tensor, Tensor]]


def from_histograms(statistic: Statistic, errors: Tensor, undefined: Tensor) -> tuple[Bounded, Tensor]:
    """Value, bound and reason from histograms (..., 2, BINS) and the number of NaN (...)."""
    right, wrong = errors.double().flip(-1).unbind(-2)
    value, bound = statistic(Ranked(wrong, right, False))
    value, reason = _scored(statistic, value, wrong, right, undefined)
    return Bounded(value, bound.where(reason == 0, torch.nan)), reason


def _scored(statistic: Statistic, value: Tensor, wrong: Tensor, right: Tensor, undefined: Tensor) -> Scored:
    wrong, right = wrong.sum(-1), right.sum(-1)
    reasons = [(Undefined.NAN_INPUT, undefined > 0), (Undefined.NO_VOXEL, wrong + right == 0)]
    if statistic is not aurc:
        reasons.append((Undefined.NO_ERROR, wrong == 0))
    if statistic is auroc:
        reasons.append((Undefined.ALL_ERRORS, right == 0))
    return scored(value, *reasons)


def _detect(
    statistic: Statistic, uncertainty: object, error: object, mask: object, method: str | None, return_reason: bool
) -> Any:
    points = check_points(uncertainty, error, mask)
    if method is None:
        method = "histogram" if isinstance(uncertainty, Tensor) and uncertainty.ndim > 2 else "exact"
    if check_choice(method, "method", ("exact", "histogram")) == "histogram":
        errors, undefined = points.histograms()
        result, reason = from_histograms(statistic, errors, undefined[:, None].expand(errors.shape[:2]))
        return answer((Bounded(*map(points.shaped, result)), points.shaped(reason)), return_reason)
    values, reasons = zip(*(_sorted(statistic, points, row) for row in range(len(points.uncertainty))), strict=True)
    return answer((points.shaped(torch.stack(t)) for t in (values, reasons)), return_reason)


def _sorted(statistic: Statistic, points: Points, row: int) -> Scored:
    """The exact value of one row, (C,): a bin for each distinct uncertainty."""
    u, error = points.uncertainty[row], points.error[row]
    if points.counted is not None:
        u, error = u[points.counted[row]], error[:, points.counted[row]]
    ordered, order = (~order_bits(u)).sort()  # descending
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    ends = last.nonzero()[:, 0] + 1
    voxels = ends.diff(prepend=ends.new_zeros(1)).double()
    # float64 holds these counts exactly
    wrong = error[:, order].cumsum(1, dtype=torch.float64)[:, ends - 1].diff(prepend=voxels.new_zeros(len(error), 1))
    right = voxels - wrong
    undefined = u.isnan().sum().expand(len(error))
    value, _ = statistic(Ranked(wrong, right, True))
    return _scored(statistic, value, wrong, right, undefined)


def auroc(bins: Ranked) -> tuple[Tensor, Tensor]:
    wrong, right, _ = bins
    pairs = wrong.sum(-1) * right.sum(-1)
    half_tied = wrong * right / 2
    return (wrong * bins.after(right) + half_tied).sum(-1) / pairs, half_tied.sum(-1) / pairs


def auprc(bins: Ranked) -> tuple[Tensor, Tensor]:
    """A bin's w wrong voxels have precision (T + i) / (T + F + i + j): i <= w of them and j <= c right ones so far.

    Mixed evenly, j / i = c / w and the sum over i is an integral. Whatever the order, and whatever is tied, each
    precision is at most (T + w) / (T + w + F) and the i-th at least (T + i) / (T + i + F + c).
    """
    wrong, right, tied = bins
    t, f, n = bins.before(wrong), bins.before(right), wrong + right
    total = wrong.sum(-1)
    if tied:
        precision = (t + wrong) / (t + f + n)
        return (wrong * precision).sum(-1) / total, torch.zeros_like(total)
    rate, seen = wrong / n.clamp_min(1), t + f
    growth = torch.where(seen > 0, torch.log1p(n / seen), 0)
    value = wrong * (rate + torch.where(n > 0, (t - seen * rate) * growth / n.clamp_min(1), 0))
    most = wrong * (t + wrong) / (t + wrong + f).clamp_min(1)
    missed = f + right
    least = wrong - torch.where(missed > 0, missed * torch.log1p(wrong / (t + missed).clamp_min(1)), 0)
    return value.sum(-1) / total, torch.maximum(most - value, value - least).sum(-1) / total


def aurc(bins: Ranked) -> tuple[Tensor, Tensor]:
    """With M voxels and E errors before a bin (now from the most certain on), its j-th has risk (E + e_j) / (M + j).

    Mixed evenly, or tied and averaged over their orders, e_j = j w / n; the extremes are all right ones first,
    e_j = max(0, j - c), and all wrong ones first, e_j = min(j, w). Sums of 1 / (M + j) are differences of digamma.
    """
    wrong, right, tied = bins
    e, n = bins.after(wrong), wrong + right
    m = e + bins.after(right)
    total = n.sum(-1)
    if tied:
        return _tied_aurc(e, m, wrong, n) / total, torch.zeros_like(total)

    def harmonic(first: Tensor, last: Tensor) -> Tensor:
        """Sum over j = first + 1 ... last of 1 / (M + j)."""
        return torch.digamma(m + last + 1) - torch.digamma(m + first + 1)

    none = torch.zeros_like(n)
    whole = harmonic(none, n)
    value = e * whole + wrong / n.clamp_min(1) * (n - m * whole)
    least = e * whole + wrong - (m + right) * harmonic(right, n)
    most = e * whole + wrong - m * harmonic(none, wrong) + wrong * harmonic(wrong, n)
    return value.sum(-1) / total, torch.maximum(most - value, value - least).sum(-1) / total


def _tied_aurc(e: Tensor, m: Tensor, wrong: Tensor, n: Tensor) -> Tensor:
    """The sum of risks voxel by voxel; here bins may be as many as voxels, and differences of digamma too coarse."""
    counts = n[0].long()
    number = int(counts.sum())
    bin_of = torch.arange(len(counts), device=n.device).repeat_interleave(counts, output_size=number)
    position = torch.arange(1, number + 1, dtype=torch.float64, device=n.device)
    j = position - (counts.cumsum(0) - counts)[bin_of]
    return ((e[:, bin_of] + j * (wrong / n)[:, bin_of]) / (m[:, bin_of] + j)).sum(1)
