"""Calibration: do probabilities say how often the model is right?

Bins are `num_bins` equal parts of [0, 1 + 1e-8], each with its lower edge: an exact 1 falls in the last bin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.metrics.state import SumState
from sure_kernels.validation import check_float_map, check_int, check_mask, check_target, values_checked


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
) -> Reliability:
    """Mean confidence, accuracy and voxels per confidence bin.

    Args:
        probability: (N, K, *spatial) floating point in [0, 1], summing to 1 over K.
        target: integer labels (N, *spatial) or (N, 1, *spatial), or one-hot (N, K, *spatial).
        num_bins: how many equal bins.
        per_class: False looks at the most probable class of each voxel (top label); True at every class on
            its own, as a question of yes or no.
        mask: boolean (N, *spatial) or (N, 1, *spatial) (0/1 numbers accepted), True = counts.
        ignore_index: label of voxels that don't count.

    Returns:
        Reliability of float64 tensors (N, num_bins), or (N, K, num_bins) where per_class.

    Raises:
        TypeError: dtypes. ValueError: shapes, labels or probabilities out of range, a mask that is not 0/1.
    """
    return _curve(_bin_sums(probability, target, num_bins, per_class, mask, ignore_index))


def expected_calibration_error(
    probability: Tensor,
    target: Tensor,
    *,
    num_bins: int = 10,
    per_class: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """ECE: the mean over voxels of |mean confidence - accuracy| of the voxel's bin.

    Arguments and errors as for `reliability_curve`.

    Returns:
        float64 (N,), or (N, K) where per_class; NaN where no voxel counts or a counted probability is NaN.
    """
    return _ece(_bin_sums(probability, target, num_bins, per_class, mask, ignore_index))


def brier_score(probability: Tensor, target: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Brier score: the mean over voxels of sum_k (p_k - y_k)^2, y the one-hot label; 0 is best, 2 worst.

    Arguments and errors as for `reliability_curve`.

    Returns:
        float64 (N,); NaN where no voxel counts.
    """
    return _mean(_brier_sums(probability, target, mask, ignore_index))


class ReliabilityCurve(SumState):
    """`reliability_curve` over all voxels seen: `compute` gives a Reliability without the axis N.

    `num_classes=None` looks at the top label, a number at each class on its own.
    """

    def __init__(self, *, num_bins: int = 10, num_classes: int | None = None) -> None:
        per_class = () if num_classes is None else (num_classes,)
        super().__init__((*per_class, 3, check_int(num_bins, "num_bins")))

    def update(
        self, probability: Tensor, target: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
    ) -> None:
        """Add a batch; arguments and errors of `reliability_curve`."""
        per_class = self.sums.ndim == 3
        sums = _bin_sums(probability, target, self.sums.shape[-1], per_class, mask, ignore_index).sum(0)
        if sums.shape != self.sums.shape:
            raise ValueError(f"probability: expected {self.sums.shape[0]} classes, got {sums.shape[0]}")
        self._add(sums)

    def _result(self, sums: Tensor) -> Reliability | Tensor:
        return _curve(sums)


class ExpectedCalibrationError(ReliabilityCurve):
    """`expected_calibration_error` over all voxels seen: `compute` is 0-d, or (K,) with `num_classes`."""

    def _result(self, sums: Tensor) -> Tensor:
        return _ece(sums)


class BrierScore(SumState):
    """`brier_score` over all voxels seen: `compute` is 0-d."""

    def __init__(self) -> None:
        super().__init__((2,))

    def update(
        self, probability: Tensor, target: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
    ) -> None:
        """Add a batch; arguments and errors of `brier_score`."""
        self._add(_brier_sums(probability, target, mask, ignore_index).sum(0))

    def _result(self, sums: Tensor) -> Tensor:
        return _mean(sums)


def _checked(
    probability: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability (N, K, n), labels (N, n) with 0 where ignored, and which voxels count (N, n)."""
    probability = check_float_map(probability, "probability", minimum_channels=2)
    if values_checked(probability) and bool(((probability < 0) | (probability > 1 + 1e-3)).any()):
        low, high = (float(v) for v in torch.aminmax(probability))
        raise ValueError(f"probability: expected values in [0, 1], got {low:.3g} to {high:.3g}")
    n, _, *spatial = probability.shape
    valid = check_mask(mask, n, spatial, probability)
    labels = check_target(target, probability, ignore_index, valid, owner="probability")
    counts = counted_voxels(labels, ignore_index)
    if valid is not None:
        counts = counts & valid
    labels = torch.where(counts, labels, 0).long()
    return probability.flatten(2), labels.flatten(1), counts.flatten(1)


def _bin_sums(
    probability: Tensor,
    target: Tensor,
    num_bins: int,
    per_class: bool,
    mask: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Sums of confidence, of hits and of voxels per bin: (N, 3, num_bins), or (N, K, 3, num_bins)."""
    if check_int(num_bins, "num_bins") < 1:
        raise ValueError(f"num_bins: expected at least 1, got {num_bins}")
    probability, labels, counts = _checked(probability, target, mask, ignore_index)
    edges = torch.linspace(0, 1 + 1e-8, num_bins + 1, dtype=torch.float64, device=probability.device)[1:-1]

    def sums(confidence: Tensor, hit: Tensor) -> Tensor:
        confidence = confidence.double()
        bins = torch.bucketize(confidence, edges, right=True)
        terms = torch.stack([confidence.where(counts, 0), (hit & counts).double(), counts.double()], 1)
        index = bins[:, None].expand_as(terms)
        return terms.new_zeros(terms.shape[0], 3, num_bins).scatter_add_(2, index, terms)

    if per_class:  # class by class, so that no float64 copy of the whole map is ever held
        return torch.stack([sums(probability[:, k], labels == k) for k in range(probability.shape[1])], 1)
    top = probability.max(1)
    return sums(top.values, top.indices == labels)


def _curve(sums: Tensor) -> Reliability:
    """(..., 3, bins) -> means per bin; 0/0 is the NaN of an empty bin."""
    confidence, hits, count = sums.unbind(-2)
    return Reliability(confidence / count, hits / count, count)


def _ece(sums: Tensor) -> Tensor:
    """(..., 3, bins) -> (...): sum_b n_b/n |mean confidence - accuracy| = sum_b |sums' difference| / n."""
    confidence, hits, count = sums.unbind(-2)
    return (confidence - hits).abs().sum(-1) / count.sum(-1)


def _brier_sums(probability: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Sum of squared errors and voxels, (N, 2)."""
    probability, labels, counts = _checked(probability, target, mask, ignore_index)
    squared = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    for k in range(probability.shape[1]):
        squared += (probability[:, k].double() - (labels == k).double()).square()
    return torch.stack([squared.where(counts, 0).sum(1), counts.double().sum(1)], 1)


def _mean(sums: Tensor) -> Tensor:
    """(..., 2) -> (...): sum over count, NaN for none."""
    return sums[..., 0] / sums[..., 1]
