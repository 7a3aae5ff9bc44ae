"""Metrics of segmentations and of their uncertainty.

Functions score each case on its own and return one number per case, NaN where the metric is undefined; with
`return_reason=True` they say why. Their stateful twins (`update` / `compute` / `reset`) pool all voxels they have seen
in sums of fixed size, which `compute(process_group)` adds over the ranks; rank statistics have no such sums, and their
twins average cases. Sums are float64 or exact integers, on the inputs' device.

`calibration_error_detection` gives calibration and error detection together from one pass over the volume.
"""

from sure_kernels.metrics.calibration import (
    AdaptiveCalibrationError,
    BrierScore,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    Reliability,
    ReliabilityCurve,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_curve,
)
from sure_kernels.metrics.detection import (
    AreaUnderRiskCoverage,
    Bounded,
    ErrorDetectionAUPRC,
    ErrorDetectionAUROC,
    area_under_risk_coverage,
    error_detection_auprc,
    error_detection_auroc,
)
from sure_kernels.metrics.histograms import SegmentationHistograms, segmentation_histograms
from sure_kernels.metrics.noise import NoiseResponse, Response, noise_response
from sure_kernels.metrics.one_pass import (
    CalibrationErrorDetection,
    SegmentationScores,
    calibration_error_detection,
)
from sure_kernels.metrics.overlap import UncertaintyErrorOverlap, uncertainty_error_overlap
from sure_kernels.metrics.ranks import (
    UncertaintyCorrelation,
    UncertaintyRatio,
    uncertainty_correlation,
    uncertainty_ratio,
)
from sure_kernels.metrics.state import CaseMean
from sure_kernels.metrics.undefined import Undefined

__all__ = [
    "AdaptiveCalibrationError",
    "AreaUnderRiskCoverage",
    "Bounded",
    "BrierScore",
    "CalibrationErrorDetection",
    "CaseMean",
    "ErrorDetectionAUPRC",
    "ErrorDetectionAUROC",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "NoiseResponse",
    "Reliability",
    "ReliabilityCurve",
    "Response",
    "SegmentationHistograms",
    "SegmentationScores",
    "UncertaintyCorrelation",
    "UncertaintyErrorOverlap",
    "UncertaintyRatio",
    "Undefined",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "brier_score",
    "calibration_error_detection",
    "error_detection_auprc",
    "error_detection_auroc",
    "expected_calibration_error",
    "negative_log_likelihood",
    "noise_response",
    "reliability_curve",
    "segmentation_histograms",
    "uncertainty_correlation",
    "uncertainty_error_overlap",
    "uncertainty_ratio",
]
