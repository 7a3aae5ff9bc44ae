"""The sweep of `closed_form`, what it does with each voxel fused by torch.compile: the `compiled` backend.

A kernel reads a slab and writes the bins that its voxels fall in, those that don't count in one behind the last; the
bins are tallied outside, where threads cannot meet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib import blocks
from sure_kernels.kernel_lib.chunks import BLOCK, flat
from sure_kernels.kernel_lib.inductor import Kernel, example
from sure_kernels.kernel_lib.labels import code_for, pack_labels, unpack_labels
from sure_kernels.ops.histograms.closed_form import fine_bin, magnitude_bin, reliability_bin
from sure_kernels.ops.histograms.reference import BINS, HALF, Parts

# Blocks of a slab: what a kernel writes of it is tallied while it is in the cache.
_SLAB = 64


class _Signature(NamedTuple):
    """What a kernel belongs to; entry K of the rows stands for the top label."""

    k: int
    num_bins: int
    parts: Parts
    dtype: torch.dtype
    uncertainty: torch.dtype | None

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"segmentation_histograms: {self.k} classes, {self.num_bins} bins, {', '.join(self._wanted)}, {kind}"

    @property
    def _wanted(self) -> list[str]:
        uncertainty = [] if self.uncertainty is None else ["uncertainty"]
        return [name for name, wanted in self.parts._asdict().items() if wanted] + uncertainty


def _rows(k: int, parts: Parts) -> range:
    """Whose confidences are binned."""
    return range(0 if parts.classes else k, k + 1 if parts.top else k)


class _Room(NamedTuple):
    """What a kernel writes of a slab, (rows, blocks, BLOCK): bins, int64."""

    confidence: Tensor  # float64
    reliability: Tensor
    magnitude: Tensor
    error: Tensor  # of the voxel, of its label and of its top label

    @classmethod
    def of(cls, s: _Signature, length: int) -> _Room:
        def room(rows: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty((rows, length, BLOCK), dtype=dtype)

        rows = len(_rows(s.k, s.parts))
        magnitudes, errors = rows if s.parts.magnitudes else 0, 0 if s.uncertainty is None else 3
        return cls(room(rows, torch.float64), room(rows), room(magnitudes), room(errors))

    def first(self, length: int) -> _Room:
        """Room for a shorter slab."""
        return _Room(*(x[:, :length] for x in self))

    def targets(self) -> list[list[Tensor]]:
        return [list(x) for x in self]


def _bins(
    p: list[Tensor], label: Tensor, u: Tensor | None, ignored: int, num_bins: int, parts: Parts
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What `_Room` holds, flat, and the sums: K of squares, K of log loss, K of voxels, two of NaN."""
    classes = len(p)
    broken = p[0] != p[0]
    for x in p[1:]:
        broken = broken | (x != x)
    given = label != ignored
    counted = given & ~broken
    undefined = [(given & broken).sum()]
    largest, top = p[0], torch.zeros_like(label)
    for k, x in enumerate(p[1:], 1):
        top = torch.where(x > largest, k, top)
        largest = torch.maximum(largest, x)
    confidence, reliability, magnitude, error = [], [], [], []
    for r in _rows(classes, parts):
        q, hit = (largest, top == label) if r == classes else (p[r], label == r)
        exact = q.double()
        confidence.append(exact)
        index = 2 * (r * num_bins + reliability_bin(exact, num_bins)) + hit.to(torch.int32)
        reliability.append(torch.where(counted, index, 2 * (classes + 1) * num_bins))
        if parts.magnitudes:
            index = 2 * HALF * (2 * r + hit.to(torch.int32)) + magnitude_bin(q)
            magnitude.append(torch.where(counted, index, 4 * HALF * (classes + 1)))
    sums: list[Tensor] = []
    if parts.loss:
        own = torch.ones_like(p[0])
        for k, x in enumerate(p):
            own = torch.where(label == k, x, own)
        loss = -own.double().log()
        is_class = [counted & (label == k) for k in range(classes)]
        squares = [(x.double() - (label == k).double()).square() for k, x in enumerate(p)]
        sums += [torch.where(counted, x, 0.0).sum() for x in squares]
        sums += [torch.where(here, loss, 0.0).sum() for here in is_class]
        sums += [here.sum() for here in is_class]
    if u is not None:
        nothing = u != u
        undefined.append((counted & nothing).sum())
        bins, wrong, counted = fine_bin(u), top != label, counted & ~nothing
        error.append(torch.where(counted, bins + BINS * wrong.to(torch.int32), 2 * BINS))
        # A label that is no class owns nothing.
        of_label = wrong & counted & (label >= 0) & (label < classes)
        error.append(torch.where(of_label, bins + BINS * label, classes * BINS))
        error.append(torch.where(wrong & counted, bins + BINS * top, classes * BINS))
    return [confidence, reliability, magnitude, error], sums + undefined


@functools.cache
def _kernel(s: _Signature) -> Kernel:
    # Numbers of their own: older versions of torch.compile compare tensors with nothing that they look up.
    ignored, num_bins, parts = code_for(s.k, banded=False).ignored, s.num_bins, s.parts

    def run(p, codes, u, out):
        # 32-bit labels: bytes would take Inductor four times as long.
        label = codes.flatten().to(torch.int32)
        rows = [x.flatten().float() for x in p]
        maps, sums = _bins(rows, label, None if u is None else u.flatten().float(), ignored, num_bins, parts)
        for rooms, values in zip(out, maps, strict=True):
            for room, x in zip(rooms, values, strict=True):
                room.copy_(x.view_as(room))
        return sums

    def arguments() -> list:
        volume = (blocks.EXAMPLE, BLOCK)
        out = [[example(*volume, dtype=x.dtype) for _ in range(len(x))] for x in _Room.of(s, 1)]
        return [
            [example(*volume, dtype=s.dtype) for _ in range(s.k)],
            example(*volume, dtype=code_for(s.k, banded=False).dtype),
            None if s.uncertainty is None else example(*volume, dtype=s.uncertainty),
            out,
        ]

    return Kernel(s.name, run, arguments)


class _Tallies:
    """Counts of one image; the last bin of each holds what doesn't count."""

    def __init__(self, s: _Signature) -> None:
        rows, bins = s.k + 1, 0 if s.uncertainty is None else BINS
        self.s = s
        self.confidence = torch.zeros(2 * rows * s.num_bins + 1, dtype=torch.float64)
        self.reliability = torch.zeros(2 * rows * s.num_bins + 1, dtype=torch.int64)
        self.magnitude = torch.zeros((4 * HALF * rows if s.parts.magnitudes else 0) + 1, dtype=torch.int64)
        self.errors = torch.zeros(2 * bins + 1, dtype=torch.int64)
        self.errors_of_class = torch.zeros(s.k * bins + 1, dtype=torch.int64)
        self.loss = torch.zeros(3 * s.k, dtype=torch.float64)
        self.undefined = torch.zeros(2, dtype=torch.int64)

    def add(self, room: _Room, sums: list[Tensor], ones: Tensor) -> None:
        """What a kernel wrote of a slab. Tallies are made by the calling thread, in the order of the voxels."""
        for q, bins in zip(room.confidence, room.reliability, strict=True):
            _tally(self.reliability, bins, ones)
            self.confidence.scatter_add_(0, bins.view(-1), q.view(-1))
        for bins in room.magnitude:
            _tally(self.magnitude, bins, ones)
        for bins, counts in zip(room.error, (self.errors, *[self.errors_of_class] * 2), strict=False):
            _tally(counts, bins, ones)
        numbers = torch.stack([x.double() for x in sums])
        if self.s.parts.loss:
            self.loss += numbers[: 3 * self.s.k]
            numbers = numbers[3 * self.s.k :]
        self.undefined[: len(numbers)] += numbers.long()

    def result(self) -> tuple[Tensor, ...]:
        """As `closed_form.segmentation_histograms` for one image."""
        rows = self.s.k + 1
        misses, hits = self.reliability[:-1].view(rows, -1, 2).unbind(-1)
        confidence = self.confidence[:-1].view(rows, -1, 2).sum(-1)
        errors = self.errors[:-1].view(2, -1)
        wrong = torch.cat([self.errors_of_class[:-1].view(self.s.k, -1), errors[1:]])
        return (
            torch.stack([confidence, hits.double(), (misses + hits).double()], 1),
            self.magnitude[:-1].view(rows, 2, -1),
            torch.stack([errors.sum(0) - wrong, wrong], 1),
            self.loss.view(3, self.s.k),
            self.undefined,
        )


def _tally(counts: Tensor, bins: Tensor, ones: Tensor) -> None:
    """counts[bins] += 1 for every one of the bins, at most as many as `ones`."""
    counts.scatter_add_(0, bins.view(-1), ones[: bins.numel()])


def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    parts: Parts,
) -> tuple[Tensor, ...]:
    """As `closed_form.segmentation_histograms`."""
    k, p = probability.shape[1], flat(probability)
    signature = _Signature(k, num_bins, parts, p.dtype, None if uncertainty is None else uncertainty.dtype)
    kernel, ignored = _kernel(signature), code_for(k, banded=False).ignored
    codes = pack_labels(target, mask, None, k, ignore_index)
    u = None if uncertainty is None else uncertainty.flatten(1)
    spans = list(blocks.spans(p.shape[2], _SLAB))
    room = _Room.of(signature, max(blocks.length(span) for span in spans))
    ones = torch.ones(BLOCK * room.confidence.shape[1], dtype=torch.int64)
    found = []
    for image, rows in enumerate(p):
        tallies = _Tallies(signature)
        for span in spans:
            own = unpack_labels(codes[image], span, k, banded=False)
            label = blocks.read(own, slice(0, span.stop - span.start), ignored)
            here = room.first(len(label))
            sums = kernel(
                [blocks.read(row, span) for row in rows],
                label,
                None if u is None else blocks.read(u[image], span),
                here.targets(),
            )
            tallies.add(here, sums, ones)
        found.append(tallies.result())
    return tuple(torch.stack(parts_) for parts_ in zip(*found, strict=True))


@functools.cache
def _binary_kernel(dtype: torch.dtype, masked: bool) -> Kernel:
    def run(value, counted, out):
        v = value.flatten().float()
        broken = v != v
        given = torch.ones_like(broken) if counted is None else counted.flatten().to(torch.int32) != 0
        out.copy_(torch.where(given & ~broken, fine_bin(v), 2 * BINS).view_as(out))
        return (given & broken).sum()

    def arguments() -> list:
        volume = (blocks.EXAMPLE, BLOCK)
        counted = example(*volume, dtype=torch.uint8) if masked else None
        return [example(*volume, dtype=dtype), counted, example(*volume, dtype=torch.int64)]

    kind = f"{str(dtype).removeprefix('torch.')}{', mask' if masked else ''}"
    return Kernel(f"binary_histogram: {kind}", run, arguments)


def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `closed_form.binary_histogram`."""
    kernel = _binary_kernel(value.dtype, counted is not None)
    n, classes, v = flag.shape
    # Behind the last bin what doesn't count, flagged or not.
    counts = torch.zeros((n, classes, 3 * BINS + 1), dtype=torch.int64)
    undefined = torch.zeros(n, dtype=torch.int64)
    spans = list(blocks.spans(v, _SLAB))
    room = torch.empty((max(map(blocks.length, spans), default=0), BLOCK), dtype=torch.int64)
    ones = room.new_ones(room.numel())
    for image in range(n):
        for span in spans:
            bins, length = room[: blocks.length(span)], span.stop - span.start
            # What is beyond the volume is NaN, and found as such where nothing says that it doesn't count.
            given = None if counted is None else blocks.read(counted[image].view(torch.uint8), span)
            undefined[image] += kernel(blocks.read(value[image], span, float("nan")), given, bins)
            if counted is None:
                undefined[image] -= bins.numel() - length
            for c, flags in enumerate(flag[image, :, span]):
                _tally(counts[image, c], bins.view(-1)[:length].add(flags, alpha=BINS), ones)
    return counts[..., : 2 * BINS].view(n, classes, 2, BINS), undefined
