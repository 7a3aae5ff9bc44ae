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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import flat, serial_slices, working_dtype
from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.ops.histograms.reference import (
    BINS,
    HALF,
    MANTISSA_BITS,
    OCTAVES,
    RELIABILITY_RANGE,
    STEPS,
    THRESHOLDS,
    Parts,
)

# (integer of the same width, stored mantissa bits, exponent bias)
_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def magnitude_bin(v: Tensor) -> Tensor:
    """The magnitude bin of float32 or float64 values, int32; NaN goes anywhere."""
    integer, mantissa, bias = _LAYOUT[v.dtype]
    w = torch.minimum(v, 1 - v)
    first_octave = (bias - OCTAVES - 1) << MANTISSA_BITS
    octave = (w.view(integer) >> (mantissa - MANTISSA_BITS)).sub_(first_octave - STEPS).to(torch.int32)
    linear = w.mul_(2.0 ** (OCTAVES + 1 + MANTISSA_BITS)).clamp_(-1, STEPS).to(torch.int32)
    half = torch.maximum(octave, linear).clamp_(0, HALF - 1)
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


def reliability_bin(p: Tensor, num_bins: int) -> Tensor:
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
    pieces = list(serial_slices(value, 1))
    ones = counts.new_ones(pieces[0][1].stop if pieces else 0)
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

    parts: Parts
    confidence_sums: Tensor  # (K + 1, num_bins) float64
    confidence_counts: Tensor  # (K + 1, num_bins, 2): misses and hits
    confidence: Tensor  # (K + 1, 2, magnitude bins)
    errors: Tensor  # (2, BINS)
    errors_of_class: Tensor  # (K, BINS)
    loss: Tensor  # (3, K) float64
    undefined: Tensor  # (2,)
    ones: Tensor  # as many as there are confidences in a piece

    def add(self, p: Tensor, label: Tensor, u: Tensor | None) -> None:
        """Probabilities (K, c), labels (c,) int64 and uncertainty (c,) of voxels that count."""
        rows, hits = ([p], [_is_class(label, len(p))]) if self.parts.classes else ([], [])
        if self.parts.top or u is not None:
            largest, top = _top(p)
            if self.parts.top:
                rows, hits = [*rows, largest[None]], [*hits, (top == label)[None]]
        if rows:
            q, hit = (x[0] if len(x) == 1 else torch.cat(x) for x in (rows, hits))
            self._add_confidence(q, hit, 0 if self.parts.classes else len(p))
        if self.parts.loss:
            self._add_loss(p.to(torch.float64, copy=True), label)
        if u is not None:
            broken = u.isnan()
            self.undefined[1] += broken.sum()
            self._add_errors(*_chosen(~broken, u, top, label))

    def _add_confidence(self, q: Tensor, hit: Tensor, first: int) -> None:
        """Confidences and hits (rows, c) of the rows from `first` on."""
        num_bins = self.confidence_sums.shape[1]
        row = torch.arange(first, first + len(q), dtype=torch.int32, device=q.device)[:, None]
        exact = q.double()
        bins = reliability_bin(exact, num_bins).add_(row * num_bins)
        self.confidence_sums.view(-1).scatter_add_(0, bins.flatten().long(), exact.flatten())
        _tally(self.confidence_counts, bins.mul_(2).add_(hit), self.ones)
        if self.parts.magnitudes:
            _tally(self.confidence, magnitude_bin(q).add_(hit, alpha=2 * HALF).add_(row * (4 * HALF)), self.ones)

    def _add_loss(self, exact: Tensor, label: Tensor) -> None:
        """Probabilities (K, c) float64, which are overwritten."""
        own = exact.gather(0, label[None])
        self.loss[1].scatter_add_(0, label, torch.special.xlogy(own.new_tensor(-1.0), own[0]))
        self.loss[2] += torch.bincount(label, minlength=len(exact))
        exact.scatter_(0, label[None], own - 1)
        self.loss[0] += exact.square().sum(1)

    def _add_errors(self, u: Tensor, top: Tensor, label: Tensor) -> None:
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
        errors = torch.stack([self.errors.sum(0) - wrong, wrong], 1)
        return reliability, self.confidence, errors, self.loss, self.undefined


def _top(p: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the classes (K, c) and which that is, int64 (c,); the first of equals."""
    first, *others = p.unbind()
    largest, top = first, torch.zeros_like(first)
    for k, row in enumerate(others, 1):
        # k where class k is larger, else 0: classes come in ascending order. As floats, which compare faster.
        top = torch.maximum(top, torch.gt(row, largest, out=torch.empty_like(largest)).mul_(k))
        largest = torch.maximum(largest, row)
    return largest, top.long()


def _is_class(label: Tensor, k: int) -> Tensor:
    """(K, c): whether the label is k."""
    return label.to(torch.int32) == torch.arange(k, dtype=torch.int32, device=label.device)[:, None]


def _pieces(
    p: Tensor, target: Tensor, mask: Tensor | None, uncertainty: Tensor | None, ignore_index: int, per_voxel: int
) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
    """(image, voxels without a probability, maps) of every piece, what doesn't count left out.

    Maps are probabilities (K, c), labels (c,) int64 and, where there is one, the uncertainty (c,), of the dtypes that
    sums are computed in. A piece is short enough for steps on `per_voxel` numbers a voxel to stay in one thread.
    """
    label = target.flatten(1)
    counted_map = None if mask is None else mask.flatten(1)
    u = None if uncertainty is None else uncertainty.flatten(1)
    for image, voxels in serial_slices(p, per_voxel):
        here = label[image, voxels]
        maps: tuple[Tensor, ...] = (p[image, :, voxels].to(working_dtype(p.dtype)), here.long())
        if u is not None:
            maps += (u[image, voxels].to(working_dtype(u.dtype)),)
        counted = counted_voxels(here, ignore_index, None if counted_map is None else counted_map[image, voxels])
        maps = _chosen(counted, *maps)
        undefined = 0
        if bool(maps[0].sum().isnan()):
            broken = maps[0].isnan().any(0)
            undefined = int(broken.sum())
            maps = _chosen(~broken, *maps)
        yield image, undefined, maps


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    parts: Parts,
) -> tuple[Tensor, ...]:
    """`reference.segmentation_histograms`."""
    n, k = probability.shape[:2]
    p = flat(probability)
    bins = 0 if uncertainty is None else BINS

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=p.device)

    per_voxel = k + 1 if parts.classes and parts.top else k
    ones = zeros(per_voxel * next(serial_slices(p, per_voxel))[1].stop).fill_(1)
    sums = [
        _Sums(
            parts,
            zeros(k + 1, num_bins, dtype=torch.float64),
            zeros(k + 1, num_bins, 2),
            zeros(k + 1, 2, 2 * HALF if parts.magnitudes else 0),
            zeros(2, bins),
            zeros(k, bins),
            zeros(3, k, dtype=torch.float64),
            zeros(2),
            ones,
        )
        for _ in range(n)
    ]
    for image, undefined, maps in _pieces(p, target, mask, uncertainty, ignore_index, per_voxel):
        sums[image].undefined[0] += undefined
        sums[image].add(maps[0], maps[1], maps[2] if len(maps) > 2 else None)
    return tuple(torch.stack(t) for t in zip(*(s.result() for s in sums), strict=True))


class Refined(NamedTuple):
    """One question of one image: sums of confidence (2 HALF,) in float64, and voxels of the bins that were wanted."""

    sums: Tensor
    confidence: Tensor
    hit: Tensor


def refine(
    probability: Tensor, target: Tensor, mask: Tensor | None, ignore_index: int, wanted: Tensor, top: bool
) -> list[list[Refined]]:
    """A second look at what magnitude histograms counted: per image, and per class or for its top label.

    `wanted` (N, questions, 2 HALF) says of which bins single voxels are needed. Confidences are taken into [0, 1].
    """
    n, questions, _ = wanted.shape
    p = flat(probability)
    sums = torch.zeros(wanted.shape, dtype=torch.float64, device=p.device)
    found: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(questions)] for _ in range(n)]
    for image, _, (q, label) in _pieces(p, target, mask, None, ignore_index, len(p[0])):
        largest, which = _top(q) if top else (q, None)
        confidence = largest.view(questions, -1).clamp(0, 1)
        hit = (which == label)[None] if which is not None else _is_class(label, questions)
        index = magnitude_bin(confidence).long()
        sums[image].scatter_add_(1, index, confidence.double())
        needed = wanted[image].gather(1, index)
        for i in range(questions):
            few = needed[i].nonzero()[:, 0]
            found[image][i].append((confidence[i].gather(0, few), hit[i].gather(0, few)))

    def joined(image: int, question: int) -> Refined:
        confidence, hit = (torch.cat(parts) for parts in zip(*found[image][question], strict=True))
        return Refined(sums[image, question], confidence, hit)

    return [[joined(image, question) for question in range(questions)] for image in range(n)]
