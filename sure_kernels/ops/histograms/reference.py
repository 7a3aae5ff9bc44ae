"""Histograms from their definitions: whole volumes, edges searched for, one class at a time.

**Magnitude bins** hold a value v, a probability or an uncertainty. Their edges, all in [0, 1], are below 1/2 those of
a small floating-point number, steps of 2^-22 up to 2^-15 and then 128 equal steps an octave, and above 1/2 the mirror
image of these: maps crowded near 0 and maps crowded near 1 are resolved alike. A bin holds its lower edge below 1/2 and
its upper edge above. What lies outside [0, 1] falls in the first and the last bin.

**Fine bins** are magnitude bins cut at the thresholds 0.01, 0.02, ..., 0.99 of the uncertainty-error overlap, which is
therefore exact. A threshold belongs to the bin below it: v > t is a union of bins.

**Reliability bins** are num_bins equal parts of [0, 1 + 1e-8], the published form: p falls in floor(p num_bins /
(1 + 1e-8)), the last one at most.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.labels import counted_voxels

MANTISSA_BITS, OCTAVES = 7, 14
STEPS = 1 << MANTISSA_BITS
HALF = (OCTAVES + 1) * STEPS
"""Magnitude bins below 1/2."""
THRESHOLDS = 99
BINS = 2 * HALF + THRESHOLDS
RELIABILITY_RANGE = 1 + 1e-8


@functools.cache
def half_edges() -> Tensor:
    """The inner edges below 1/2, ascending: float64 (HALF - 1,)."""
    step = torch.arange(STEPS, dtype=torch.float64)
    linear = step[1:] * 2.0 ** (-OCTAVES - 1 - MANTISSA_BITS)
    octaves = [(1 + step / STEPS) * 2.0 ** (i - OCTAVES - 1) for i in range(OCTAVES)]
    return torch.cat([linear, *octaves])


@functools.cache
def thresholds() -> Tensor:
    """0.01, 0.02, ..., 0.99: float64."""
    return torch.arange(1, THRESHOLDS + 1, dtype=torch.float64) / (THRESHOLDS + 1)


@functools.cache
def magnitude_edges() -> Tensor:
    """All edges of the magnitude bins, 0 and 1 included: float64 (2 HALF + 1,), ascending."""
    half = half_edges()
    return torch.cat([half, 1 - half, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)]).sort().values


def magnitude_bin(v: Tensor) -> Tensor:
    """The magnitude bin of each value, int64; NaN goes anywhere."""
    v, half = v.double().contiguous(), half_edges().to(v.device)
    below = torch.bucketize(v, half, right=True)
    above = 2 * HALF - 1 - torch.bucketize(1 - v, half, right=True)
    return torch.where(v < 0.5, below, above)


def fine_bin(v: Tensor) -> Tensor:
    """The fine bin of each value, int64; NaN goes anywhere."""
    return magnitude_bin(v) + torch.bucketize(v.double().contiguous(), thresholds().to(v.device))


def reliability_bin(p: Tensor, num_bins: int) -> Tensor:
    """The reliability bin of each probability, int64."""
    return (p.double() * (num_bins / RELIABILITY_RANGE)).long().clamp(0, num_bins - 1)


class Parts(NamedTuple):
    """Which sums of a segmentation are wanted."""

    classes: bool = True
    """Reliability of every class."""
    top: bool = True
    """Reliability of the top label."""
    magnitudes: bool = True
    """Magnitude histograms of the confidence, of classes and top label where these are wanted."""
    loss: bool = True
    """Brier score and likelihood."""


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fine histograms of `value` where each `flag` is False and where it is True.

    Args:
        value: (N, V).
        flag: boolean (N, C, V).
        counted: boolean (N, V), or None where every value counts.

    Returns:
        int64 (N, C, 2, BINS), and the number of counted NaN, int64 (N,); those are in no histogram.
    """
    undefined = (value.isnan() if counted is None else value.isnan() & counted).sum(1)
    counted = ~value.isnan() if counted is None else counted & ~value.isnan()
    return _split(fine_bin(value), flag, counted, BINS), undefined


def _split(bins: Tensor, flag: Tensor, counted: Tensor, number: int) -> Tensor:
    """(N, C, 2, number): how often each of the bins (N, V) is counted, where `flag` (N, C, V) is False and True."""
    counts = torch.zeros((*flag.shape[:2], 2, number), dtype=torch.int64, device=bins.device)
    for n, c, side in itertools.product(range(len(bins)), range(flag.shape[1]), (0, 1)):
        chosen = counted[n] & (flag[n, c] == bool(side))
        counts[n, c, side] = torch.bincount(bins[n, chosen], minlength=number)
    return counts


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    parts: Parts,
) -> tuple[Tensor, ...]:
    """All sums from which the metrics follow; entry k < K stands for class k, entry K for the top label.

    The top label is the most probable class (the first of equals); it is hit where it is the target. Class k is hit
    where the target is k, and wrong where just one of top label and target is k. A voxel with a NaN probability is
    only counted as such, one with a NaN uncertainty is left out of the uncertainty's histograms alone.

    Args:
        probability: (N, K, *spatial).
        target: integers (N, *spatial).
        mask: boolean (N, *spatial), or None.
        uncertainty: (N, *spatial), or None.
        ignore_index: label of voxels that don't count.
        num_bins: reliability bins.
        parts: what is wanted; the rest is 0, or has no bins.

    Returns:
        reliability: float64 (N, K + 1, 3, num_bins), sums of confidence, of hits and of voxels per reliability bin.
        confidence: int64 (N, K + 1, 2, 2 HALF), magnitude histograms of the confidence of misses and hits.
        errors: int64 (N, K + 1, 2, BINS), fine histograms of the uncertainty where right and where wrong; 0 bins
            without uncertainty.
        loss: float64 (N, 3, K), sums of (p_k - y_k)^2, of -ln p_k over the voxels of class k, and how many these are.
        undefined: int64 (N, 2), counted voxels with a NaN probability and, of the others, with a NaN uncertainty.
    """
    n, k = probability.shape[:2]
    p, label = probability.double().flatten(2), target.long().flatten(1)
    counted = counted_voxels(target, ignore_index, mask).flatten(1)
    broken = p.isnan().any(1)
    undefined = (broken & counted).sum(1)
    counted = counted & ~broken
    y = label[:, None] == torch.arange(k, device=p.device)[:, None]
    top = p.where(~broken[:, None], 0).max(1)
    confidence = torch.cat([p, top.values[:, None]], 1)
    hit = torch.cat([y, (top.indices == label)[:, None]], 1)

    reliability = torch.zeros((n, k + 1, 3, num_bins), dtype=torch.float64, device=p.device)
    for b in range(num_bins):
        inside = (reliability_bin(confidence, num_bins) == b) & counted[:, None]
        terms = torch.stack([confidence, hit.double(), torch.ones_like(confidence)], 2)
        reliability[..., b] = terms.where(inside[:, :, None], 0).sum(-1)

    rows = torch.tensor([parts.classes] * k + [parts.top], device=p.device)[:, None, None]
    reliability = reliability * rows
    squares = (p - y.double()).square().where(counted[:, None], 0).sum(-1)
    own = counted[:, None] & y
    loss = torch.stack([squares, (-p.log()).where(own, 0).sum(-1), own.sum(-1).double()], 1)
    if not parts.loss:
        loss.zero_()

    counts, errors = (torch.zeros((n, k + 1, 2, 0), dtype=torch.int64, device=p.device) for _ in range(2))
    without = torch.zeros_like(undefined)
    if parts.magnitudes:
        questions = zip(confidence.unbind(1), hit.unbind(1), strict=True)
        counts = torch.cat([_split(magnitude_bin(q), h[:, None], counted, 2 * HALF) for q, h in questions], 1) * rows
    if uncertainty is not None:
        predicted = top.indices[:, None] == torch.arange(k, device=p.device)[:, None]
        wrong = torch.cat([predicted ^ y, ~hit[:, -1:]], 1)
        errors, without = binary_histogram(uncertainty.flatten(1), wrong, counted)
    return reliability, counts, errors, loss, torch.stack([undefined, without], 1)
