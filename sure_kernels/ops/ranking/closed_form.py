"""Pairwise ranking with its gradient, exact in O(n log n) time and O(n) memory.

A sum over pairs is a sum over points: with D_i = the sum of y_i - y_j over the points j that form a violating pair with
i, the loss of a set is sum_i x_i D_i / M and its derivative by x_i is D_i / M, M being the number of violating pairs:
half the sum of C_i, the number of such points j. So two numbers a point are all there is to find, and each comes from
a count and a sum of scores over the points that i dominates or is dominated by.

Points are sorted by (score ascending, value descending): that is their position. Their rank is their place by (value
ascending, position descending). Then i dominates j, strictly in both, exactly where rank and position of i are the
larger: ties are excluded by construction. From the highest bit of the rank down, points that agree in all higher bits
form a node and stand in order of position; inside a node every point whose bit is 1 dominates the points before it
whose bit is 0, and each dominated pair is met at the one bit where the ranks part. Then each node is split stably into
its zeros and its ones. As ranks are a permutation, a node is an aligned run of 2^(bit + 1) slots, so that where a point
comes from and where it goes give the counts, and one running sum of scores an arrangement gives the sums.

Sums are float64, of scores and values about the first point of their set: they cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.ordering import order_bits
from sure_kernels.ops.ranking.reference import FLAT

# Pairs that the published program averages at a time, before it sums these means.
OFFICIAL_CHUNK = 20_000
# Sampled pairs held at a time.
SAMPLED_CHUNK = 1 << 20


@dataclass(frozen=True)
class Sets:
    """Points that count: those of one set (image and group) side by side, sets of one image side by side.

    value, score: (P,) float, the score already negated for an increasing relation.
    index: (P,) place in the flattened rows (N n), or None where every point counts and stands where it stood.
    sizes: (sets,) int64. image: (sets,) int64, the row that a set belongs to. rows: N.
    """

    value: Tensor
    score: Tensor
    index: Tensor | None
    sizes: Tensor
    image: Tensor
    rows: int

    @property
    def starts(self) -> Tensor:
        return self.sizes.cumsum(0) - self.sizes

    def spread(self, per_set: Tensor) -> Tensor:
        """(P,) from one number a set."""
        if len(per_set) == 1:
            return per_set.expand(len(self.value))
        return per_set.repeat_interleave(self.sizes, output_size=len(self.value))

    def sum(self, per_point: Tensor) -> Tensor:
        """(sets,) from one number a point: float64, or int64."""
        if self.index is None:  # sets of one size, and on a GPU a segment would have one block of threads
            return per_point.view(self.rows, -1).sum(1)
        if per_point.is_floating_point():
            return torch.segment_reduce(per_point, "sum", lengths=self.sizes, unsafe=True, initial=0)
        running = torch.cumsum(per_point, 0)
        return torch.cat((running.new_zeros(1), running))[self.sizes.cumsum(0)].diff(prepend=running.new_zeros(1))

    def by_row(self, per_set: Tensor) -> Tensor:
        """(N,) sums of one number a set."""
        return per_set.new_zeros(self.rows).index_put_((self.image,), per_set, accumulate=True)

    def about_first(self, x: Tensor) -> Tensor:
        """x (P,) minus that of the first point of its set, float64."""
        x = x.double()
        if not len(x):
            return x
        return x - self.spread(x[self.starts.clamp_max(len(x) - 1)])

    def about_mean(self, x: Tensor) -> Tensor:
        """x (P,) minus the mean of its set, float64."""
        x = self.about_first(x)
        return x - self.spread(self.sum(x) / self.sizes.clamp_min(1))


def sets_of(values: Tensor, scores: Tensor, mask: Tensor | None, groups: Tensor | None, relation: str) -> Sets:
    """The sets that rows (N, n), mask and groups of the same shape stand for.

    How many points count decides shapes, so on a GPU the host waits for a mask or groups.
    """
    n_rows, n = values.shape
    device = values.device
    scores = scores if relation == "decreasing" else -scores
    image, sizes = torch.arange(n_rows, device=device), torch.full((n_rows,), n, device=device)
    if mask is None and groups is None:
        return Sets(values.flatten(), scores.flatten(), None, sizes, image, n_rows)
    if mask is None:
        index = torch.arange(n_rows * n, device=device)
    else:
        index, sizes = mask.flatten().nonzero()[:, 0], mask.sum(1)
    if groups is not None:
        codes, group = torch.unique(groups.flatten()[index], return_inverse=True)
        key, order = ((index // n) * len(codes) + group).sort(stable=True)
        index = index[order]
        key, sizes = torch.unique_consecutive(key, return_counts=True)
        image = key // max(len(codes), 1)
    return Sets(values.flatten()[index], scores.flatten()[index], index, sizes, image, n_rows)


def _codes(x: Tensor) -> Tensor:
    """int64 in [-2^31, 2^31) that order (and tie) as the numbers x (P,) do."""
    bits = order_bits(x)
    if x.dtype != torch.float64:
        return bits.to(torch.int64)
    ordered, order = bits.sort()
    dense = torch.zeros_like(ordered)
    dense[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(dense).scatter_(0, order, dense)


def order_and_rank(sets: Sets) -> tuple[Tensor, Tensor]:
    """(position -> point, rank -> position), both (P,) int64 and set by set; see the module's docstring."""
    value, score = _codes(sets.value), _codes(sets.score)
    of_set = sets.spread(torch.arange(len(sets.sizes), device=value.device))
    # One integer a point and one radix sort: the score above, the value (descending) below.
    order = ((score << 32) - value).sort(stable=True).indices
    if len(sets.sizes) > 1:
        order = order[of_set[order].sort(stable=True).indices]
    # The last position first, so that the stable sort puts positions of one value in descending order.
    last = order.flip(0)
    by_rank = ((of_set[last] << 32) + value[last]).sort(stable=True).indices
    return order, len(order) - 1 - by_rank


class Pairs(NamedTuple):
    """difference: D of each point (P,) float64. total: sum of x D of each set, float64. number: its M, int64."""

    difference: Tensor
    total: Tensor
    number: Tensor


class Level(NamedTuple):
    """One bit of the rank, from the highest: how points move, and what they meet. All (P,), slot by slot.

    source: the slot that a point comes from. is_one: whether it is among the ones of its node. number: the zeros before
    a one, or the ones after a zero, in the node. middle, outer: where the zeros of its node end, and where the node
    starts for a one and ends for a zero.
    """

    source: Tensor
    is_one: Tensor
    number: Tensor
    middle: Tensor
    outer: Tensor


def levels(sets: Sets, by_rank: Tensor) -> Iterator[Level]:
    """The split of every node into its zeros and its ones, down to single points; see the module's docstring."""
    slots = torch.arange(len(by_rank), device=by_rank.device)
    starts = sets.spread(sets.starts)
    ends = starts + sets.spread(sets.sizes)
    local = slots - starts
    rank = torch.empty_like(local).scatter_(0, by_rank, local)
    largest = int(sets.sizes.max()) if len(sets.sizes) else 0
    for bit in reversed(range(max(largest - 1, 0).bit_length())):
        # Which slots the points of a node come from: its zeros first, then its ones, each in order of position.
        was_one, is_one = ((rank >> bit) & 1).bool(), ((local >> bit) & 1).bool()
        source = torch.empty_like(slots)
        source.masked_scatter_(is_one, was_one.nonzero()[:, 0])
        source.masked_scatter_(~is_one, (~was_one).nonzero()[:, 0])
        rank = rank.index_select(0, source)
        # A one needs the zeros before it in the node, a zero the ones after it: with what stands before it in the old
        # and in the new arrangement, and with where the zeros of the node end, both follow by subtraction.
        start = slots - (local & ((2 << bit) - 1))
        middle = torch.minimum(start + (1 << bit), ends)
        outer = torch.where(is_one, start, torch.minimum(start + (2 << bit), ends))
        ahead = source - slots + middle - outer
        yield Level(source, is_one, torch.where(is_one, ahead, -ahead), middle, outer)


def dominated(sets: Sets) -> tuple[Tensor, Tensor]:
    """D (P,) float64 and C (P,) int64 of every point."""
    order, by_rank = order_and_rank(sets)
    score = sets.about_first(sets.score)[order]
    difference, count = torch.zeros_like(score), torch.zeros_like(order)
    running = score.new_zeros(len(order) + 1)
    torch.cumsum(score, 0, out=running[1:])
    for source, is_one, number, middle, outer in levels(sets, by_rank):
        score, difference, count, before = (x.index_select(0, source) for x in (score, difference, count, running))
        running = torch.zeros_like(running)
        torch.cumsum(score, 0, out=running[1:])
        total = before - running[:-1] + running.index_select(0, middle) - running.index_select(0, outer)
        count += number
        difference += score * number - torch.where(is_one, total, -total)
    # What rounding left at a point that violates nothing; multiplied, so that NaN stays NaN.
    difference *= count > 0
    # The arrangement is by rank now: from there to positions, and to points.
    place = order[by_rank]
    return (
        torch.empty_like(difference).scatter_(0, place, difference),
        torch.empty_like(count).scatter_(0, place, count),
    )


def concordant_pairs(sets: Sets) -> Tensor:
    """(sets,) int64: M of `violating_pairs`, without its sums."""
    _, by_rank = order_and_rank(sets)
    number = torch.zeros_like(by_rank)
    for level in levels(sets, by_rank):
        number += level.number.where(level.is_one, 0)  # points never leave their set
    return sets.sum(number)


def violating_pairs(sets: Sets) -> Pairs:
    """Sums over all pairs of a set with (x_i - x_j)(y_i - y_j) > 0."""
    difference, count = dominated(sets)
    return Pairs(difference, sets.sum(sets.about_first(sets.value) * difference), sets.sum(count) // 2)


class Ranking(NamedTuple):
    """loss (N,) of each row, and slope (P,) of its derivative by each point's value: float64."""

    loss: Tensor
    slope: Tensor


def exact(sets: Sets, pairs: Pairs, times: Tensor | None) -> Ranking:
    """All pairs, pooled over the sets of a row; or the means of sets added up, each `times` (sets,) as often."""
    if times is None:
        share = (1.0 / sets.by_row(pairs.number).clamp_min(1).double())[sets.image]
    else:
        share = times.double() / pairs.number.clamp_min(1)
    return Ranking(sets.by_row(pairs.total * share), pairs.difference * sets.spread(share))


def covariance(sets: Sets) -> Ranking:
    """relu(Cov(x, y) / std(y)) of each row, moments about the means of its sets."""
    dx, dy = (
        x - sets.spread(sets.sum(x) / sets.sizes.clamp_min(1)) for x in map(sets.about_first, (sets.value, sets.score))
    )
    number = sets.by_row(sets.sizes).clamp_min(1).double()

    def moment(x: Tensor) -> Tensor:
        return sets.by_row(sets.sum(x)) / number

    variance = moment(dy * dy)
    # Negated, so that NaN comes through.
    usable = ~(variance <= FLAT**2 * moment(sets.score.double().square())) & (number > 1)
    inverse = torch.where(usable, variance, 1.0).rsqrt()
    value = moment(dx * dy) * inverse
    active = usable & ~(value <= 0)
    factor = torch.where(active, inverse / number, 0.0)
    return Ranking(torch.where(active, value, 0.0), dy * sets.spread(factor[sets.image]))


def published_samples(sizes: list[int], num_pairs: int | None) -> list[int]:
    """Pairs that the published program draws from each image: `num_pairs` can only shrink from image to image.

    None stands for the number of points of the first image that has two.
    """
    drawn = []
    for n in sizes:
        if n < 2:
            drawn.append(0)
            continue
        num_pairs = min(n if num_pairs is None else num_pairs, n * (n - 1) // 2)
        drawn.append(num_pairs)
    return drawn


def official_times(sets: Sets, num_pairs: int | None, grouped: bool) -> Tensor:
    """How often the published programs count the mean of each set, (sets,): PriUS once, SURE once for every chunk of
    the pairs that it draws from an image (by default all there are)."""
    if grouped:
        return torch.ones_like(sets.sizes)
    sizes = sets.sizes.tolist()
    drawn = published_samples(sizes, max(sizes, default=0) ** 2 if num_pairs is None else num_pairs)
    return torch.tensor([-(-n // OFFICIAL_CHUNK) for n in drawn], device=sets.sizes.device)


def sampled(sets: Sets, groups: Tensor | None, num_pairs: list[int], generator: Any | None, official: bool) -> Ranking:
    """The mean over the violating ones among `num_pairs` (one number a row) pairs drawn with replacement.

    `sets` are whole rows; pairs across two of the `groups` (P,) do not count. `official` adds up the means of chunks.
    """
    value, score = sets.value.double(), sets.score.double()
    slope = torch.zeros_like(value)
    loss = value.new_zeros(sets.rows)
    chunk = OFFICIAL_CHUNK if official else SAMPLED_CHUNK
    start = 0
    for row, (n, drawn) in enumerate(zip(sets.sizes.tolist(), num_pairs, strict=True)):
        i, j = (torch.randint(0, max(n, 1), (drawn,), generator=generator, device=value.device) for _ in range(2))
        i, j = i[i != j] + start, j[i != j] + start
        number = value.new_zeros(())
        for part_i, part_j in zip(i.split(chunk), j.split(chunk), strict=True):
            dx, dy = value[part_i] - value[part_j], score[part_i] - score[part_j]
            # Signs, not the product, decide: a product of tiny differences may round to 0.
            violated = torch.sign(dx) * torch.sign(dy) > 0
            if groups is not None:
                violated &= groups[part_i] == groups[part_j]
            push = torch.where(violated, dy, 0.0)
            if official:
                push /= violated.sum().clamp_min(1)
            number += violated.sum()
            loss[row] += (dx * push).sum()
            slope.index_put_((part_i,), push, accumulate=True)
            slope.index_put_((part_j,), -push, accumulate=True)
        if not official:
            loss[row] /= number.clamp_min(1)
            slope[start : start + n] /= number.clamp_min(1)
        start += n
    return Ranking(loss, slope)


def on_rows(sets: Sets, slope: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The slope of each point as rows `shape` (N, n) of `dtype`, 0 where no point is."""
    slope = slope.to(dtype)
    if sets.index is None:
        return slope.view(shape)
    out = torch.zeros(shape, dtype=dtype, device=slope.device)
    out.view(-1)[sets.index] = slope
    return out
