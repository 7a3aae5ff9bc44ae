"""The histograms in one sweep over cache-sized pieces: nothing of full size is held but the inputs.

The fine bin of v comes from its bits. With w = min(v, 1 - v), which is exact, the exponent and the leading seven bits
of the mantissa count steps of an octave, and w 2^22 those below the lowest octave; the larger of the two (the second
held at its largest) is the bin, mirrored above 1/2. Thresholds below v are ceil(100 v) - 1: 100 v is exact in float64
for narrower types, and float64 itself is compared with the thresholds on both sides.

Voxels that don't count are taken out of a piece before anything else, so that no sum needs a weight. Wrong voxels are
few: the histograms of each class's errors read those alone. On the CPU every step runs in the calling thread: pieces
are small enough for that, and the few operations that torch would split even so (max, ceil, log, advanced indexing) are
written in others. Starting and joining threads for steps of 20 microseconds gains little, and where other processes
want the cores it costs a hundred times the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import flat, voxel_slices, working_dtype
from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.ops.histograms.reference import (
    BINS,
    HALF,
    MANTISSA_BITS,
    OCTAVES,
    RELIABILITY_RANGE,
    STEPS,
    THRESHOLDS,
)

# (integer of the same width, stored mantissa bits, exponent bias)
_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
# Rows of a piece for `voxel_slices` and each map in it: 32768 numbers, from which on torch starts threads.
_ROWS = 4


def magnitude_bin(v: Tensor) -> Tensor:
    """The magnitude bin of float32 or float64 values, int32; NaN goes anywhere."""
    integer, mantissa, bias = _LAYOUT[v.dtype]
    w = torch.minimum(v, 1 - v)
    first_octave = (bias - OCTAVES - 1) << MANTISSA_BITS
    octave = (w.view(integer) >> (mantissa - MANTISSA_BITS)).sub_(first_octave - STEPS).to(torch.int32)
    linear = w.mul_(2.0 ** (OCTAVES + 1 + MANTISSA_BITS)).clamp_(-1, STEPS).to(torch.int32)
    half = torch.maximum(octave, linear, out=octave).clamp_(0, HALF - 1)
    # |half - 0| below 1/2, |half - (2 HALF - 1)| above: the mirror image.
    return half.add_(v >= 0.5, alpha=1 - 2 * HALF).abs_()


def thresholds_below(v: Tensor) -> Tensor:
    """#{i in 1..99: i / 100 < v}, int32."""
    hundred = THRESHOLDS + 1
    scaled = (v.double() * hundred).clamp_(0, hundred)
    below = scaled.to(torch.int32)
    if v.dtype != torch.float64:
        return below.add_(below == scaled, alpha=-1).clamp_(0, THRESHOLDS)
    # 100 v was rounded: it may have met, or passed, a threshold.
    below.add_(v <= below.double() / hundred, alpha=-1).clamp_(0, THRESHOLDS)
    return below.add_(v > (below + 1).double() / hundred).clamp_(0, THRESHOLDS)


def fine_bin(v: Tensor) -> Tensor:
    """The fine bin of float32 or float64 values, int32; NaN goes anywhere."""
    return magnitude_bin(v).add_(thresholds_below(v))


def _reliability_bin(p: Tensor, num_bins: int) -> Tensor:
    """The reliability bin of float64 probabilities, int32."""
    return (p * (num_bins / RELIABILITY_RANGE)).to(torch.int32).clamp_(0, num_bins - 1)


def _tally(counts: Tensor, index: Tensor, ones: Tensor) -> None:
    """counts.flatten()[index] += 1 for every one of the indices, at most as many as `ones`."""
    index = index.flatten().long()
    counts.view(-1).scatter_add_(0, index, ones[: index.numel()])


def _chosen(chosen: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """Maps (..., c) at the voxels (c,) that are chosen."""
    if bool(chosen.all()):
        return maps
    index = chosen.nonzero()[:, 0]
    return tuple(x.gather(-1, index.expand(*x.shape[:-1], -1)) for x in maps)


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.binary_histogram`."""
    counts = torch.zeros((*flag.shape[:2], 2, BINS), dtype=torch.int64, device=value.device)
    undefined = torch.zeros(value.shape[0], dtype=torch.int64, device=value.device)
    pieces = list(voxel_slices(value[:, None], _ROWS))
    ones = counts.new_ones(pieces[0][1].stop)
    for n, voxels in pieces:
        v, flags = value[n, voxels].to(working_dtype(value.dtype)), flag[n, :, voxels]
        if counted is not None:
            v, flags = _chosen(counted[n, voxels], v, flags)
        broken = v.isnan()
        undefined[n] += broken.sum()
        v, flags = _chosen(~broken, v, flags)
        bins = fine_bin(v)
        for c, wrong in enumerate(flags):
            _tally(counts[n, c], bins.add(wrong, alpha=BINS), ones)
    return counts, undefined


@dataclass
class _Sums:
    """What the sweep adds up of one image; the result of `segmentation_histograms` follows from it."""

    confidence_sums: Tensor  # (K + 1, num_bins) float64
    confidence_counts: Tensor  # (K + 1, num_bins, 2): misses and hits
    confidence: Tensor  # (K + 1, 2, magnitude bins)
    errors: Tensor  # (2, BINS)
    errors_of_class: Tensor  # (K, BINS)
    loss: Tensor  # (2, K) float64
    undefined: Tensor  # (2,)
    ones: Tensor  # as many as there are confidences in a piece

    def add_confidence(self, p: Tensor, label: Tensor) -> Tensor:
        """Probabilities (K, c) and labels (c,) int64, none to be left out; returns the top label (c,) int64."""
        k, num_bins = len(p), self.confidence_sums.shape[1]
        row = torch.arange(k + 1, dtype=torch.int32, device=p.device)[:, None]
        q, top = _with_top(p)
        hit = torch.cat([label.to(torch.int32) == row[:k], (top == label)[None]])
        exact = q.double()
        bins = _reliability_bin(exact, num_bins).add_(row * num_bins)
        self.confidence_sums.view(-1).scatter_add_(0, bins.flatten().long(), exact.flatten())
        _tally(self.confidence_counts, bins.mul_(2).add_(hit), self.ones)
        if self.confidence.numel():
            _tally(self.confidence, magnitude_bin(q).add_(hit, alpha=2 * HALF).add_(row * (4 * HALF)), self.ones)
        own = exact[:k].gather(0, label[None])
        self.loss[1].scatter_add_(0, label, torch.special.xlogy(own.new_tensor(-1.0), own[0]))
        exact[:k].scatter_(0, label[None], own - 1)
        self.loss[0] += exact[:k].square().sum(1)
        return top

    def add_errors(self, u: Tensor, top: Tensor, label: Tensor) -> None:
        """Uncertainty (c,) float32 or float64, none of it NaN, top label and label."""
        wrong = top != label
        bins = fine_bin(u)
        _tally(self.errors, bins.add(wrong, alpha=BINS), self.ones)
        few = wrong.nonzero()[:, 0]
        bins = bins.gather(0, few)
        for owner in (label, top):
            _tally(self.errors_of_class, owner.gather(0, few).mul_(BINS).add_(bins), self.ones)

    def result(self) -> tuple[Tensor, ...]:
        misses, hits = self.confidence_counts.unbind(-1)
        reliability = torch.stack([self.confidence_sums, hits.double(), (misses + hits).double()], 1)
        wrong = torch.cat([self.errors_of_class, self.errors[1:]])
        return (
            reliability,
            self.confidence,
            torch.stack([self.errors.sum(0) - wrong, wrong], 1),
            self.loss,
            self.undefined,
        )


def _with_top(p: Tensor) -> tuple[Tensor, Tensor]:
    """The classes (K, c) with the largest one below them, and which that is, int64 (c,); the first of equals."""
    largest, top = p[0], torch.zeros(p.shape[1:], dtype=torch.int32, device=p.device)
    for k in range(1, len(p)):
        # k where class k is larger, else 0: classes come in ascending order.
        top = torch.maximum(top, (p[k] > largest).to(torch.int32).mul_(k))
        largest = torch.maximum(largest, p[k])
    return torch.cat([p, largest[None]]), top.long()


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    fine: bool,
) -> tuple[Tensor, ...]:
    """`reference.segmentation_histograms`."""
    k = probability.shape[1]
    p_flat, label_flat = flat(probability), target.flatten(1)
    mask_flat = None if mask is None else mask.flatten(1)
    u_flat = None if uncertainty is None else uncertainty.flatten(1)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=probability.device)

    pieces = list(voxel_slices(p_flat, _ROWS * (k + 1)))
    ones = zeros((k + 1) * pieces[0][1].stop).fill_(1)
    sums = [
        _Sums(
            zeros(k + 1, num_bins, dtype=torch.float64),
            zeros(k + 1, num_bins, 2),
            zeros(k + 1, 2, 2 * HALF if fine else 0),
            zeros(2, 0 if u_flat is None else BINS),
            zeros(k, 0 if u_flat is None else BINS),
            zeros(2, k, dtype=torch.float64),
            zeros(2),
            ones,
        )
        for _ in probability
    ]
    for image, voxels in pieces:
        label = label_flat[image, voxels]
        maps: tuple[Tensor, ...] = (p_flat[image, :, voxels].to(working_dtype(p_flat.dtype)), label.long())
        if u_flat is not None:
            maps += (u_flat[image, voxels].to(working_dtype(u_flat.dtype)),)
        counted = counted_voxels(label, ignore_index)
        if mask_flat is not None:
            counted = counted & mask_flat[image, voxels]
        maps = _chosen(counted, *maps)
        if bool(maps[0].sum().isnan()):
            broken = maps[0].isnan().any(0)
            sums[image].undefined[0] += broken.sum()
            maps = _chosen(~broken, *maps)
        p, label = maps[:2]
        top = sums[image].add_confidence(p, label)
        for u in maps[2:]:
            broken = u.isnan()
            sums[image].undefined[1] += broken.sum()
            sums[image].add_errors(*_chosen(~broken, u, top, label))
    return tuple(torch.stack(t) for t in zip(*(s.result() for s in sums), strict=True))
