"""Metrics of segmentations and of their uncertainty.

Functions score each case on its own and return one number per case, NaN where the metric is undefined.
Their stateful twins (`update` / `compute` / `reset`) pool all voxels they have seen in sums of fixed size,
which `compute(process_group)` adds over the ranks. Sums are float64, on the inputs' device.
"""

from sure_kernels.metrics.calibration import (
    BrierScore,
    ExpectedCalibrationError,
    Reliability,
    ReliabilityCurve,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from sure_kernels.metrics.overlap import UncertaintyErrorOverlap, uncertainty_error_overlap
from sure_kernels.metrics.ranks import uncertainty_correlation, uncertainty_ratio

__all__ = [
    "BrierScore",
    "ExpectedCalibrationError",
    "Reliability",
    "ReliabilityCurve",
    "UncertaintyErrorOverlap",
    "brier_score",
    "expected_calibration_error",
    "reliability_curve",
    "uncertainty_correlation",
    "uncertainty_error_overlap",
    "uncertainty_ratio",
]
