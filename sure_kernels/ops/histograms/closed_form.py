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
    """The fine bin of float32 or float64 values among those without thresholds, int32; NaN goes anywhere."""
    integer, mantissa, bias = _LAYOUT[v.dtype]
    upper = v >= 0.5
    w = torch.minimum(v, 1 - v)
    first_octave = (bias - OCTAVES - 1) << MANTISSA_BITS
    octave = (w.view(integer) >> (mantissa - MANTISSA_BITS)).sub_(first_octave - STEPS).to(torch.int32)
    linear = w.mul_(2.0 ** (OCTAVES + 1 + MANTISSA_BITS)).clamp_(-1, STEPS).to(torch.int32)
    half = torch.maximum(octave, linear, out=octave).clamp_(0, HALF - 1)
    return torch.where(upper, 2 * HALF - 1 - half, half)


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


def reliability_bin(p: Tensor, num_bins: int) -> Tensor:
    """The reliability bin of float64 probabilities, int64."""
    return (p * (num_bins / RELIABILITY_RANGE)).long().clamp_(0, num_bins - 1)


def _with_top(p: Tensor) -> tuple[Tensor, Tensor]:
    """The classes (K, c) with the largest one below them, and which that is, int64 (c,); the first of equals."""
    largest, which = p[0], torch.zeros(p.shape[1:], dtype=torch.int32, device=p.device)
    for k in range(1, len(p)):
        # k where class k is larger, else 0: classes come in ascending order.
        which = torch.maximum(which, (p[k] > largest).to(torch.int32).mul_(k))
        largest = torch.maximum(largest, p[k])
    return torch.cat([p, largest[None]]), which.long()


def _tally(counts: Tensor, index: Tensor, ones: Tensor) -> None:
    """counts.flatten()[index] += 1, for every one of the indices."""
    index = index.flatten().long()
    counts.view(-1).scatter_add_(0, index, ones[: index.numel()])


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.binary_histogram`."""
    counts = torch.zeros((*flag.shape[:2], 2, BINS), dtype=torch.int64, device=value.device)
    undefined = torch.zeros(value.shape[0], dtype=torch.int64, device=value.device)
    ones = None
    for n, voxels in voxel_slices(value[:, None], _ROWS):
        v, flags = value[n, voxels].to(working_dtype(value.dtype)), flag[n, :, voxels]
        chosen = ~v.isnan()
        if counted is not None:
            chosen &= counted[n, voxels]
            undefined[n] += counted[n, voxels].sum() - chosen.sum()
        else:
            undefined[n] += v.numel() - chosen.sum()
        if not bool(chosen.all()):
            index = chosen.nonzero()[:, 0]
            v, flags = v.gather(0, index), flags.gather(1, index.expand(len(flags), -1))
        bins = fine_bin(v)
        ones = torch.ones_like(bins, dtype=torch.int64) if ones is None else ones
        for c, wrong in enumerate(flags):
            _tally(counts[n, c], bins.add(wrong, alpha=BINS), ones)
    return counts, undefined


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
    n, k = probability.shape[:2]
    device = probability.device
    p_flat, label_flat = flat(probability), target.flatten(1)
    mask_flat = None if mask is None else mask.flatten(1)
    u_flat = None if uncertainty is None else uncertainty.flatten(1)
    magnitudes = 2 * HALF if fine else 0

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros((n, *shape), dtype=dtype, device=device)

    sums, tallies = zeros(k + 1, num_bins, dtype=torch.float64), zeros(k + 1, num_bins, 2)
    confidence, loss = zeros(k + 1, 2, magnitudes), zeros(2, k, dtype=torch.float64)
    errors, wrong_of_class, undefined = zeros(2, BINS), zeros(k, BINS), zeros(2)
    row = torch.arange(k + 1, dtype=torch.int32, device=device)[:, None]
    minus_one = torch.tensor(-1.0, dtype=torch.float64, device=device)
    ones: Tensor | None = None

    for image, voxels in voxel_slices(p_flat, _ROWS * (k + 1)):
        p, label = p_flat[image, :, voxels], label_flat[image, voxels]
        u = None if u_flat is None else u_flat[image, voxels]
        counted = counted_voxels(label, ignore_index)
        if mask_flat is not None:
            counted = counted & mask_flat[image, voxels]
        if bool(p.sum().isnan()):
            broken = p.isnan().any(0) & counted
            undefined[image, 0] += broken.sum()
            counted = counted & ~broken
        if not bool(counted.all()):
            index = counted.nonzero()[:, 0]
            p, label = p.gather(1, index.expand(k, -1)), label.gather(0, index)
            u = None if u is None else u.gather(0, index)
        if not label.numel():
            continue

        label = label.long()
        q, predicted = _with_top(p.to(working_dtype(p.dtype)))
        hit = torch.cat([label == row[:k], (predicted == label)[None]])
        if ones is None:  # the first piece is the largest
            ones = torch.ones((k + 1) * (voxels.stop - voxels.start), dtype=torch.int64, device=device)
        exact = q.double()
        bins = reliability_bin(exact, num_bins).add_(row * num_bins)
        sums[image].view(-1).scatter_add_(0, bins.flatten(), exact.flatten())
        _tally(tallies[image], bins.mul_(2).add_(hit), ones)
        if fine:
            _tally(confidence[image], magnitude_bin(q).add_(hit, alpha=magnitudes).add_(row * (2 * magnitudes)), ones)
        own = exact[:k].gather(0, label[None])
        loss[image, 1].scatter_add_(0, label, torch.special.xlogy(minus_one, own[0]))
        exact[:k].scatter_(0, label[None], own - 1)
        loss[image, 0] += exact[:k].square().sum(1)
        if u is None:
            continue

        u = u.to(working_dtype(u.dtype))
        wrong = ~hit[k]
        if bool(u.sum().isnan()):
            defined = ~u.isnan()
            undefined[image, 1] += u.numel() - defined.sum()
            index = defined.nonzero()[:, 0]
            u, wrong, predicted, label = (t.gather(0, index) for t in (u, wrong, predicted, label))
        code = fine_bin(u)
        _tally(errors[image], code.add(wrong, alpha=BINS), ones)
        few = wrong.nonzero()[:, 0]
        code = code.gather(0, few)
        for owner in (label, predicted):
            _tally(wrong_of_class[image], owner.gather(0, few) * BINS + code, ones)

    misses, hits = tallies.unbind(-1)
    reliability = torch.stack([sums, hits.double(), (misses + hits).double()], 2)
    if u_flat is None:
        return reliability, confidence, zeros(k + 1, 2, 0), loss, undefined
    wrongs = torch.cat([wrong_of_class, errors[:, 1:]], 1)
    return reliability, confidence, torch.stack([errors.sum(1, keepdim=True) - wrongs, wrongs], 2), loss, undefined
