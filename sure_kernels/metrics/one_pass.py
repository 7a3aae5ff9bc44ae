"""Calibration and error detection together, from one pass over the volume."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.metrics.calibration import (
    Reliability,
    ace_of,
    brier_of,
    curve_of,
    ece_of,
    nll_of,
)
from sure_kernels.metrics.detection import Bounded, auprc, aurc, auroc, from_histograms
from sure_kernels.metrics.histograms import (
    MOST_CLASSES,
    Columns,
    SegmentationHistograms,
    check_num_bins,
    columns,
    segmentation_histograms,
)
from sure_kernels.metrics.overlap import ueo_of
from sure_kernels.metrics.state import SumState
from sure_kernels.metrics.undefined import Undefined, answer, scored
from sure_kernels.ops.histograms.reference import BINS, HALF
from sure_kernels.validation import check_count, plain_tensor


class SegmentationScores(NamedTuple):
    """Calibration and error detection of each case, (N,), and of each of its classes, (N, K); float64.

    Without the axis N from the stateful twin. Class k is wrong where just one of prediction and target is k.
    """

    voxels: Tensor
    """How many count."""
    error_rate: Tensor
    """Share of voxels that are wrong."""
    reliability: Reliability
    expected_calibration_error: Tensor
    adaptive_calibration_error: Bounded
    brier_score: Tensor
    negative_log_likelihood: Tensor
    uncertainty_error_overlap: Tensor
    error_detection_auroc: Bounded
    error_detection_auprc: Bounded
    area_under_risk_coverage: Bounded
    error_rate_per_class: Tensor
    reliability_per_class: Reliability
    expected_calibration_error_per_class: Tensor
    adaptive_calibration_error_per_class: Bounded
    brier_score_per_class: Tensor
    negative_log_likelihood_per_class: Tensor
    uncertainty_error_overlap_per_class: Tensor
    error_detection_auroc_per_class: Bounded
    error_detection_auprc_per_class: Bounded
    area_under_risk_coverage_per_class: Bounded


def calibration_error_detection(
    probability: Tensor,
    target: Tensor,
    uncertainty: Tensor,
    *,
    num_bins: int = 10,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_reason: bool = False,
) -> Any:
    """All calibration and error-detection metrics from one pass, in memory that does not grow with the volume.

    Each is what the function of its name returns, with histograms where that has a choice.

    Args:
        probability: (N, K, *spatial) floating point in [0, 1], summing to 1 over K.
        target: integer labels (N, *spatial) or (N, 1, *spatial), or one-hot (N, K, *spatial).
        uncertainty: (N, 1, *spatial) or (N, *spatial), floating point, meant to lie in [0, 1].
        num_bins: reliability bins and ranges of the adaptive error.
        mask: boolean (N, *spatial) or (N, 1, *spatial) (0/1 numbers accepted), True = counts.
        ignore_index: label of voxels that don't count.
        return_reason: also return SegmentationScores of the reasons for NaN, see `Undefined`.

    Returns:
        SegmentationScores.

    Raises:
        TypeError: dtypes. ValueError: shapes, labels or probabilities out of range, a mask that is not 0/1.
    """
    plain_tensor(uncertainty, "uncertainty")  # which may be None below
    sums = segmentation_histograms(
        probability, target, uncertainty, num_bins=num_bins, mask=mask, ignore_index=ignore_index
    )
    return answer(scores_of(sums, num_bins), return_reason)


class CalibrationErrorDetection(SumState):
    """`calibration_error_detection` over all voxels seen: `compute` gives SegmentationScores without the axis N."""

    def __init__(self, num_classes: int, *, num_bins: int = 10) -> None:
        k = check_count(num_classes, "num_classes", minimum=2, maximum=MOST_CLASSES)
        self._num_bins = check_num_bins(num_bins)
        super().__init__(
            reliability=(k + 1, 3, self._num_bins),
            confidence=(k + 1, 2, 2 * HALF),
            errors=(k + 1, 2, BINS),
            loss=(3, k),
            undefined=(2,),
        )

    def update(
        self,
        probability: Tensor,
        target: Tensor,
        uncertainty: Tensor,
        *,
        mask: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        """Add a batch; arguments and errors of `calibration_error_detection`."""
        plain_tensor(uncertainty, "uncertainty")
        sums = segmentation_histograms(
            probability, target, uncertainty, num_bins=self._num_bins, mask=mask, ignore_index=ignore_index
        )
        k = self.sums["loss"].shape[1]
        if sums.loss.shape[-1] != k:
            raise ValueError(f"probability: expected {k} classes, got {sums.loss.shape[-1]}")
        self._add(**{name: t.sum(0) for name, t in sums._asdict().items()})

    def _result(self, **sums: Tensor) -> tuple[SegmentationScores, SegmentationScores]:
        return scores_of(SegmentationHistograms(**sums), self._num_bins)


def scores_of(sums: SegmentationHistograms, num_bins: int) -> tuple[SegmentationScores, SegmentationScores]:
    """Scores and reasons from the sums, with or without the axis N."""
    values: dict[str, Any] = {}
    reasons: dict[str, Any] = {}
    for suffix, per_class in (("", False), ("_per_class", True)):
        part = columns(sums, per_class)
        undefined = part.undefined.sum(-1)
        results = {
            "error_rate": _error_rate(part),
            "reliability": curve_of(part),
            "expected_calibration_error": ece_of(part),
            "adaptive_calibration_error": ace_of(part, num_bins),
            "brier_score": brier_of(part),
            "negative_log_likelihood": nll_of(part, per_class),
            "uncertainty_error_overlap": ueo_of(part.errors, undefined),
            "error_detection_auroc": from_histograms(auroc, part.errors, undefined),
            "error_detection_auprc": from_histograms(auprc, part.errors, undefined),
            "area_under_risk_coverage": from_histograms(aurc, part.errors, undefined),
        }
        for name, (value, reason) in results.items():
            values[name + suffix], reasons[name + suffix] = value, reason
    voxels = columns(sums, False).reliability[..., 2, :].sum(-1)
    reasons["voxels"] = torch.zeros_like(voxels, dtype=torch.int8)
    return SegmentationScores(voxels=voxels, **values), SegmentationScores(**reasons)


def _error_rate(part: Columns) -> Any:
    wrong, voxels = part.errors[..., 1, :].sum(-1).double(), part.errors.sum((-1, -2))
    undefined = part.undefined.sum(-1)
    return scored(wrong / voxels, (Undefined.NAN_INPUT, undefined > 0), (Undefined.NO_VOXEL, voxels == 0))
