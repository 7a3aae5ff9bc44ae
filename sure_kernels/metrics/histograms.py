"""The one pass over a segmentation from which calibration and error detection follow, with its arguments checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.backends import get_backend
from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.metrics.state import SumState
from sure_kernels.ops.histograms import op
from sure_kernels.ops.histograms.reference import BINS, HALF
from sure_kernels.validation import (
    FLOAT_DTYPES,
    check_float_map,
    check_int,
    check_mask,
    check_target,
    check_voxel_map,
    values_checked,
)

# Probabilities may exceed 1 by so much: half-precision rounding.
_SLACK = 1e-3


class SegmentationHistograms(NamedTuple):
    """Sums over the counted voxels of each case: entry k < K for class k, entry K for the top label.

    A case is scored from its own; added up over cases they score all voxels together. What the bins are says
    `sure_kernels.ops.histograms.reference`.
    """

    reliability: Tensor
    """float64 (N, K + 1, 3, num_bins): sums of confidence, of hits and of voxels."""
    confidence: Tensor
    """int64 (N, K + 1, 2, magnitude bins): confidence of misses and of hits; no bins unless asked for."""
    errors: Tensor
    """int64 (N, K + 1, 2, fine bins): uncertainty where right and where wrong; no bins without uncertainty."""
    loss: Tensor
    """float64 (N, 2, K): sums of (p_k - y_k)^2, and of -ln p_k over the voxels of class k."""
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
    confidence: bool = True,
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
        confidence: whether the histograms of the confidence are wanted (adaptive calibration error).

    Raises:
        TypeError: dtypes. ValueError: shapes, labels or probabilities out of range, a mask that is not 0/1.
    """
    check_num_bins(num_bins)
    p, labels, counted, ignore_index = _check(probability, target, mask, ignore_index)
    u = None
    if uncertainty is not None:
        u = check_voxel_map(uncertainty, "uncertainty", len(p), p.shape[2:], p, owner="probability").detach()
        if u.dtype not in FLOAT_DTYPES:
            raise TypeError(f"uncertainty: expected float32, bfloat16, float16 or float64, got {u.dtype}")
    backend = get_backend(p if u is None or u.dtype != torch.float64 else u, "segmentation_histograms")
    return SegmentationHistograms(
        *op.segmentation_histograms(p, labels, counted, u, ignore_index, num_bins, bool(confidence), backend)
    )


def counted_voxels_of(
    probability: object, target: object, mask: object, ignore_index: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked probability (N, K, V), label (N, V), and which voxels count (N, V)."""
    p, labels, counted, index = _check(probability, target, mask, ignore_index)
    counts = counted_voxels(labels, index)
    if counted is not None:
        counts = counts & counted
    return p.flatten(2), labels.flatten(1), counts.flatten(1)


def _check(
    probability: object, target: object, mask: object, ignore_index: object
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    p = check_float_map(probability, "probability", minimum_channels=2).detach()
    if values_checked(p):
        _check_range(p)
    n, _, *spatial = p.shape
    counted = check_mask(mask, n, spatial, p)
    index = check_int(ignore_index, "ignore_index")
    return p, check_target(target, p, index, counted, owner="probability"), counted, index


def check_num_bins(num_bins: object) -> int:
    number = check_int(num_bins, "num_bins")
    if number < 1:
        raise ValueError(f"num_bins: expected at least 1, got {num_bins}")
    return number


def _check_range(p: Tensor) -> None:
    low, high = (float(v) for v in torch.aminmax(p))
    if low >= 0 and high <= 1 + _SLACK:
        return
    outside = p[(p < 0) | (p > 1 + _SLACK)]  # NaN is none of these
    if outside.numel():
        low, high = (float(v) for v in torch.aminmax(outside))
        raise ValueError(f"probability: expected values in [0, 1], got {low:.3g} to {high:.3g}")


def columns(sums: SegmentationHistograms, per_class: bool) -> SegmentationHistograms:
    """The sums of each class (..., K) or of the top label (...), with `loss` and `undefined` in that shape too.

    `loss` then is (..., 2), of each class or of all.
    """
    chosen = slice(-1) if per_class else -1
    reliability, confidence, errors = (t[..., chosen, :, :] for t in sums[:3])
    loss, undefined = sums.loss.sum(-1), sums.undefined
    if per_class:
        loss = sums.loss.transpose(-1, -2)
        undefined = undefined[..., None, :].expand_as(loss)
    return SegmentationHistograms(reliability, confidence, errors, loss, undefined)


class PooledHistograms(SumState):
    """Some of the sums of a SegmentationHistograms, over all voxels seen: of the top label or of each class."""

    needs: tuple[str, ...]

    def __init__(self, *, num_bins: int = 10, num_classes: int | None = None) -> None:
        self._num_bins, self._num_classes = check_num_bins(num_bins), num_classes
        sizes = {
            "reliability": (3, self._num_bins),
            "confidence": (2, 2 * HALF),
            "errors": (2, BINS),
            "loss": (2,),
            "undefined": (2,),
        }
        leading = () if num_classes is None else (check_int(num_classes, "num_classes"),)
        super().__init__(**{name: (*leading, *sizes[name]) for name in (*self.needs, "undefined")})

    def update(
        self, probability: Tensor, target: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
    ) -> None:
        """Add a batch; arguments and errors of the function of the same name."""
        sums = segmentation_histograms(
            probability,
            target,
            num_bins=self._num_bins,
            mask=mask,
            ignore_index=ignore_index,
            confidence="confidence" in self.needs,
        )
        self._pool(sums)

    def _pool(self, sums: SegmentationHistograms) -> None:
        k = sums.loss.shape[-1]
        if self._num_classes not in (None, k):
            raise ValueError(f"probability: expected {self._num_classes} classes, got {k}")
        chosen = columns(sums, self._num_classes is not None)._asdict()
        self._add(**{name: chosen[name].sum(0) for name in self.sums})

    def _result(self, **sums: Tensor) -> Any:
        empty = dict.fromkeys(SegmentationHistograms._fields, sums["undefined"].new_zeros(0))
        return self._scored(SegmentationHistograms(**(empty | sums)))

    def _scored(self, sums: SegmentationHistograms) -> Any:
        """Result and reason from the sums of the chosen columns."""
        raise NotImplementedError
