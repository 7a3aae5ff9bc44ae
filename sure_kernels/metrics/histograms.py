"""The one pass over a segmentation from which calibration and error detection follow, with its arguments checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.backends import dispatch
from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.metrics.state import SumState
from sure_kernels.ops.histograms import op
from sure_kernels.ops.histograms.reference import HALF, Parts
from sure_kernels.validation import (
    FLOAT_DTYPES,
    check_count,
    check_float_map,
    check_int,
    check_mask,
    check_target,
    check_voxel_map,
    values_checked,
)

# Probabilities may exceed 1 by so much: half-precision rounding.
_SLACK = 1e-3
# Far above what is of use, below what no machine holds; classes as many as uint16 labels tell apart.
MOST_BINS = MOST_CLASSES = 2**16


class SegmentationHistograms(NamedTuple):
    """Sums over the counted voxels of each case: entry k < K for class k, entry K for the top label.

    A case is scored from its own; added up over cases they score all voxels together. What the bins are says
    `sure_kernels.ops.histograms.reference`.
    """

    reliability: Tensor
    """float64 (N, K + 1, 3, num_bins): sums of confidence, of hits and of voxels."""
    confidence: Tensor
    """int64 (N, K + 1, 2, magnitude bins): confidence of misses and of hits."""
    errors: Tensor
    """int64 (N, K + 1, 2, fine bins): uncertainty where right and where wrong; no bins without uncertainty."""
    loss: Tensor
    """float64 (N, 3, K): sums of (p_k - y_k)^2, of -ln p_k over the voxels of class k, and how many these are."""
    undefined: Tensor
    """int64 (N, 2): voxels with a NaN probability and, of the others, with a NaN uncertainty."""


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    uncertainty: Tensor | None = None,
    *,
    num_bins: int = 10,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> SegmentationHistograms:
    """All sums that calibration and error detection need, in one pass and memory that does not grow with the volume.

    The top label is the most probable class, the first of equals. It is wrong where it is not the target; class k is
    wrong where just one of top label and target is k.

    Args:
        probability: (N, K, *spatial) floating point in [0, 1], summing to 1 over K.
        target: integer labels (N, *spatial) or (N, 1, *spatial), or one-hot (N, K, *spatial).
        uncertainty: (N, 1, *spatial) or (N, *spatial), floating point, meant to lie in [0, 1].
        num_bins: reliability bins.
        mask: boolean (N, *spatial) or (N, 1, *spatial) (0/1 numbers accepted), True = counts.
        ignore_index: label of voxels that don't count.

    Raises:
        TypeError: dtypes. ValueError: shapes, labels or probabilities out of range, a mask that is not 0/1.
    """
    return histograms_of(Segmentation.checked(probability, target, mask, ignore_index), Parts(), num_bins, uncertainty)


class Segmentation(NamedTuple):
    """Checked arguments."""

    probability: Tensor  # (N, K, *spatial)
    labels: Tensor  # (N, *spatial)
    mask: Tensor | None  # (N, *spatial)
    ignore_index: int

    @classmethod
    def checked(cls, probability: object, target: object, mask: object, ignore_index: object) -> Segmentation:
        p = check_float_map(probability, "probability", minimum_channels=2).detach()
        n, _, *spatial = p.shape
        counted = check_mask(mask, n, spatial, p)
        index = check_int(ignore_index, "ignore_index")
        labels = check_target(target, p, index, counted, owner="probability")
        if values_checked(p):
            _check_range(p, labels, counted, index)
        return cls(p, labels, counted, index)


def histograms_of(
    segmentation: Segmentation, parts: Parts, num_bins: int = 1, uncertainty: object = None
) -> SegmentationHistograms:
    """The sums that are wanted; the others are 0 or have no bins."""
    check_num_bins(num_bins)
    p, labels, mask, ignore_index = segmentation
    u = None
    if uncertainty is not None:
        u = check_voxel_map(uncertainty, "uncertainty", len(p), p.shape[2:], p, owner="probability").detach()
        if u.dtype not in FLOAT_DTYPES:
            raise TypeError(f"uncertainty: expected float32, bfloat16, float16 or float64, got {u.dtype}")
    backend = dispatch(p if u is None or u.dtype != torch.float64 else u.unsqueeze(1), "segmentation_histograms")
    return SegmentationHistograms(
        *op.segmentation_histograms(p, labels, mask, u, ignore_index, num_bins, *parts, backend)
    )


def check_num_bins(num_bins: object) -> int:
    return check_count(num_bins, "num_bins", maximum=MOST_BINS)


def _check_range(p: Tensor, labels: Tensor, mask: Tensor | None, ignore_index: int) -> None:
    low, high = (float(v) for v in torch.aminmax(p))
    if low >= 0 and high <= 1 + _SLACK:
        return
    counted = counted_voxels(labels, ignore_index, mask)
    outside = p[((p < 0) | (p > 1 + _SLACK)) & counted.unsqueeze(1)]  # NaN is none of these
    if outside.numel():
        low, high = (float(v) for v in torch.aminmax(outside))
        raise ValueError(f"probability: expected values in [0, 1], got {low:.3g} to {high:.3g}")


class Columns(NamedTuple):
    """The sums of each class (..., K), or of the top label (...)."""

    reliability: Tensor  # (..., 3, num_bins)
    confidence: Tensor  # (..., 2, magnitude bins)
    errors: Tensor  # (..., 2, fine bins)
    loss: Tensor  # (..., 4): squares, log loss, voxels of the class (for the top label all), all voxels
    undefined: Tensor  # (..., 2)


def columns(sums: SegmentationHistograms, per_class: bool) -> Columns:
    chosen = slice(-1) if per_class else -1
    reliability, confidence, errors = (t[..., chosen, :, :] for t in sums[:3])
    total = sums.loss.sum(-1)
    if not per_class:
        return Columns(reliability, confidence, errors, torch.cat([total, total[..., 2:]], -1), sums.undefined)
    of_class = sums.loss.mT
    voxels = total[..., None, 2:].expand(*of_class.shape[:-1], 1)
    undefined = sums.undefined[..., None, :].expand(*of_class.shape[:-1], 2)
    return Columns(reliability, confidence, errors, torch.cat([of_class, voxels], -1), undefined)


class PooledHistograms(SumState):
    """Some of the sums of a segmentation, over all voxels seen: of the top label or of each class."""

    needs: tuple[str, ...]

    def __init__(self, *, num_bins: int = 10, num_classes: int | None = None) -> None:
        self._num_bins, self._num_classes = check_num_bins(num_bins), num_classes
        sizes = {"reliability": (3, self._num_bins), "confidence": (2, 2 * HALF), "loss": (4,), "undefined": (2,)}
        leading = (
            () if num_classes is None else (check_count(num_classes, "num_classes", minimum=2, maximum=MOST_CLASSES),)
        )
        super().__init__(**{name: (*leading, *sizes[name]) for name in (*self.needs, "undefined")})

    def update(
        self, probability: Tensor, target: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
    ) -> None:
        """Add a batch; arguments and errors of the function of the same name."""
        segmentation = Segmentation.checked(probability, target, mask, ignore_index)
        k, per_class = segmentation.probability.shape[1], self._num_classes is not None
        if self._num_classes not in (None, k):
            raise ValueError(f"probability: expected {self._num_classes} classes, got {k}")
        parts = binned(per_class, magnitudes="confidence" in self.needs)
        if "loss" in self.needs:
            parts = ONLY_LOSS
        chosen = columns(histograms_of(segmentation, parts, self._num_bins), per_class)._asdict()
        self._add(**{name: chosen[name].sum(0) for name in self.sums})

    def _result(self, **sums: Tensor) -> Any:
        empty = dict.fromkeys(Columns._fields, sums["undefined"].new_zeros(0))
        return self._scored(Columns(**(empty | sums)))

    def _scored(self, sums: Columns) -> Any:
        """Result and reason from the sums."""
        raise NotImplementedError


ONLY_LOSS = Parts(classes=False, top=False, magnitudes=False)


def binned(per_class: bool, *, magnitudes: bool = False) -> Parts:
    """Bins of the classes or of the top label, and nothing else."""
    return Parts(classes=per_class, top=not per_class, magnitudes=magnitudes, loss=False)
