"""The histograms in one sweep over cache-sized pieces: nothing of full size is held but the inputs.

The fine bin of v comes from its bits. With w = min(v, 1 - v), which is exact, the exponent and the leading seven bits of
the mantissa count steps of an octave, and w 2^22 those below the lowest octave; the larger of the two (the second held at
its largest) is the bin. For v <= 1/2 thresholds below v are ceil(100 v) - 1: 100 v is exact in float64 for narrower
types, and float64 itself is compared with the thresholds on both sides.

Voxels that don't count are taken out of a piece before anything else, so that no sum needs a weight. Wrong voxels are
few: the histograms of each class's errors read those alone.
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


def fine_bin(v: Tensor) -> Tensor:
    """The fine bin of float32 or float64 values, int32; NaN goes anywhere."""
    integer, mantissa, bias = _LAYOUT[v.dtype]
    upper = v >= 0.5
    w = torch.where(upper, 1 - v, v).clamp_(min=0)
    first_octave = (bias - OCTAVES - 1) << MANTISSA_BITS
    octave = (w.view(integer) >> (mantissa - MANTISSA_BITS)) - (first_octave - STEPS)
    linear = w.mul_(2.0 ** (OCTAVES + 1 + MANTISSA_BITS)).clamp_(max=STEPS).to(torch.int32)
    half = torch.maximum(octave.to(torch.int32), linear).clamp_(max=HALF - 1)
    code = torch.where(upper, 2 * HALF - 1 - half, half)
    return code.add_(_thresholds_below(v))


def _thresholds_below(v: Tensor) -> Tensor:
    """#{i in 1..99: i / 100 < v}, int32."""
    hundred = THRESHOLDS + 1
    below = (v.double() * hundred).ceil_().sub_(1).clamp_(0, THRESHOLDS)
    if v.dtype == torch.float64:  # 100 v was rounded: it may have met, or passed, a threshold
        below = below + ((below < THRESHOLDS) & (v > (below + 1) / hundred)).double()
        below = below - ((below > 0) & (v <= below / hundred)).double()
    return below.to(torch.int32)


def reliability_bin(p: Tensor, num_bins: int) -> Tensor:
    """The reliability bin of float64 probabilities, int64."""
    return (p * (num_bins / RELIABILITY_RANGE)).long().clamp_(0, num_bins - 1)


def _counts(bins: Tensor, flag: Tensor) -> Tensor:
    """(2, BINS) of the bins (c,) where `flag` (c,) is False and True."""
    return torch.bincount(bins.add(flag, alpha=BINS), minlength=2 * BINS).view(2, BINS)


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference.binary_histogram`."""
    counts = torch.zeros((*flag.shape[:2], 2, BINS), dtype=torch.int64, device=value.device)
    undefined = torch.zeros(value.shape[0], dtype=torch.int64, device=value.device)
    for n, voxels in voxel_slices(value[:, None], 4):
        v, flags = value[n, voxels].to(working_dtype(value.dtype)), flag[n, :, voxels]
        chosen = torch.ones_like(v, dtype=torch.bool) if counted is None else counted[n, voxels]
        broken = v.isnan() & chosen
        undefined[n] += broken.sum()
        chosen = chosen & ~broken
        if not bool(chosen.all()):
            v, flags = v[chosen], flags[:, chosen]
        bins = fine_bin(v)
        for c, wrong in enumerate(flags):
            counts[n, c] += _counts(bins, wrong)
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
    dtype = working_dtype(probability.dtype)

    sums = torch.zeros((n, (k + 1) * num_bins), dtype=torch.float64, device=device)
    tallies = torch.zeros((n, (k + 1) * num_bins * 2), dtype=torch.int64, device=device)
    confidence = torch.zeros((n, k + 1, 2, BINS if fine else 0), dtype=torch.int64, device=device)
    wrong_of_class = torch.zeros((n, k, BINS), dtype=torch.int64, device=device)
    detection = torch.zeros((n, 2, BINS), dtype=torch.int64, device=device)
    loss = torch.zeros((n, 2, k), dtype=torch.float64, device=device)
    undefined = torch.zeros((n, 2), dtype=torch.int64, device=device)
    row = torch.arange(k + 1, device=device)[:, None]

    for image, voxels in voxel_slices(p_flat, k):
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
            p, label = p[:, counted], label[counted]
            u = None if u is None else u[counted]

        label = label.long()
        top = p.max(0)
        q = torch.cat([p, top.values[None]]).to(dtype)
        hit = torch.cat([label == row[:k], (top.indices == label)[None]])
        exact = q.double()
        bins = reliability_bin(exact, num_bins).add_(row * num_bins).flatten()
        sums[image] += torch.bincount(bins, exact.flatten(), minlength=sums.shape[1])
        tallies[image] += torch.bincount(bins * 2 + hit.flatten(), minlength=tallies.shape[1])
        if fine:
            code = (fine_bin(q) + row * (2 * BINS)).add_(hit, alpha=BINS)
            confidence[image] += torch.bincount(code.flatten(), minlength=confidence[image].numel()).view(-1, 2, BINS)
        own = exact[:k].gather(0, label[None])[0]
        loss[image, 1] -= torch.bincount(label, own.log(), minlength=k)
        loss[image, 0] += exact[:k].sub_(hit[:k].double()).square_().sum(1)
        if u is None:
            continue

        u = u.to(working_dtype(u.dtype))
        defined = ~u.isnan()
        undefined[image, 1] += u.numel() - defined.sum()
        code = fine_bin(u)
        wrong = ~hit[k]
        detection[image] += _counts(code[defined], wrong[defined])
        few = (wrong & defined).nonzero()[:, 0]
        for owner in (label[few], top.indices[few]):
            tally = torch.bincount(code[few] + owner * BINS, minlength=k * BINS)
            wrong_of_class[image] += tally.view(k, BINS)

    misses, hits = tallies.view(n, k + 1, num_bins, 2).unbind(-1)
    reliability = torch.stack([sums.view_as(hits), hits.double(), (misses + hits).double()], 2)
    if u_flat is None:
        errors = detection.new_zeros((n, k + 1, 2, 0))
    else:
        wrongs = torch.cat([wrong_of_class, detection[:, 1:]], 1)
        errors = torch.stack([detection.sum(1, keepdim=True) - wrongs, wrongs], 2)
    return reliability, confidence, errors, loss, undefined
