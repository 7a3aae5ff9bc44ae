"""Rank statistics of two quantities over a set of voxels: UCC and UR.

Both are exact for any number of points: O(n log n) time, O(n) memory, ties told apart exactly.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sure_kernels.metrics.points import as_result, each_set
from sure_kernels.validation import check_choice


def uncertainty_correlation(
    x: Tensor, y: Tensor, *, mask: Tensor | None = None, groups: Tensor | None = None
) -> Tensor:
    """UCC: Spearman's rank correlation of `x` and `y`, average ranks for ties.

    Args:
        x: maps (N, 1, *spatial), sets of points (N, n) or one set (n,); floating point.
        y: the same shape as x.
        mask: boolean (0/1 numbers accepted), True = counts; the shape of x, maps also (N, *spatial).
        groups: integers of the shape of mask, for example the label: correlate within each group, then
            average over the groups of a row where the correlation is defined.

    Returns:
        float64 (N,), 0-d for one set, each in [-1, 1]; NaN for fewer than two points, where x or y is
        constant, and where a counted value is NaN.

    Raises:
        TypeError: dtype of x, y or groups. ValueError: shapes that differ, a mask that is not 0/1.
    """
    x, rows = each_set(x, y, mask, groups)
    result = torch.full((x.shape[0] if x.ndim > 1 else 1,), torch.nan, dtype=torch.float64, device=x.device)
    for row, sets in enumerate(rows):
        if sets:
            result[row] = torch.stack([_spearman(pair) for pair in sets]).nanmean()
    return as_result(result, x)


def _spearman(pair: Tensor) -> Tensor:
    n = pair.shape[1]
    if n < 2 or bool(pair.isnan().any()):
        return pair.new_tensor(torch.nan)
    ranks = torch.stack([_average_ranks(values) for values in pair]) - (n + 1) / 2
    variance_x, variance_y = ranks.square().sum(1)
    # 0/0 is the NaN of a constant input: centred ranks are exact halves, so the sum is exactly 0 there
    return ((ranks[0] * ranks[1]).sum() / (variance_x * variance_y).sqrt()).clamp(-1, 1)


def _average_ranks(values: Tensor) -> Tensor:
    """1-based ranks (n,), equal values sharing the mean of their positions."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[inverse]


def uncertainty_ratio(
    x: Tensor,
    y: Tensor,
    *,
    relation: Literal["decreasing", "increasing"] = "decreasing",
    ties: Literal["exclude", "official"] = "exclude",
    mask: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """UR: the share of unordered pairs of points that follow the relation between `x` and `y`.

    A pair follows "decreasing" where the larger x has the smaller y, "increasing" where it has the larger.

    Args:
        x: maps (N, 1, *spatial), sets of points (N, n) or one set (n,); floating point.
        y: the same shape as x.
        relation: what a pair has to follow.
        ties: "exclude" leaves pairs tied in x or y out of both counts, so that a perfect relation scores 1;
            "official" divides by all pairs and counts a pair tied in both as following, tied in one as not.
        mask: boolean (0/1 numbers accepted), True = counts; the shape of x, maps also (N, *spatial).
        groups: integers of the shape of mask: only pairs within a group count, pooled over a row's groups.

    Returns:
        float64 (N,), 0-d for one set, each in [0, 1]; NaN where no pair counts or a counted value is NaN.

    Raises:
        TypeError: dtype of x, y or groups. ValueError: shapes that differ, a mask that is not 0/1, an
            unknown relation or ties.
    """
    check_choice(relation, "relation", ("decreasing", "increasing"))
    check_choice(ties, "ties", ("exclude", "official"))
    x, rows = each_set(x, y, mask, groups)
    result = []
    for sets in rows:
        if any(bool(pair.isnan().any()) for pair in sets):
            result.append(torch.nan)
            continue
        concordant, discordant, both, total = (
            sum(column) for column in zip(*[_pair_counts(pair) for pair in sets], (0, 0, 0, 0), strict=True)
        )
        follow = discordant if relation == "decreasing" else concordant
        if ties == "official":
            follow, among = follow + both, total
        else:
            among = concordant + discordant
        result.append(follow / among if among else torch.nan)
    return as_result(torch.tensor(result, dtype=torch.float64, device=x.device), x)


def _pair_counts(pair: Tensor) -> tuple[int, int, int, int]:
    """Unordered pairs of the points (2, n): concordant, discordant, tied in both, all. Exact integers."""
    n = pair.shape[1]
    if n < 2:
        return 0, 0, 0, 0
    x = torch.unique(pair[0], return_inverse=True)[1]
    y = torch.unique(pair[1], return_inverse=True)[1]
    joint = x * (y.max() + 1) + y
    tied_x, tied_y, tied_both = (_tied_pairs(codes) for codes in (x, y, joint))
    total = n * (n - 1) // 2
    # By (x, y) ascending, points tied in x ascend in y: what is left out of order is discordant
    discordant = _inversions(y[joint.argsort()])
    concordant = total - tied_x - tied_y + tied_both - discordant
    return concordant, discordant, tied_both, total


def _tied_pairs(codes: Tensor) -> int:
    counts = torch.unique(codes, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _inversions(codes: Tensor) -> int:
    """#{i < j : codes_i > codes_j} of non-negative integers (n,), in one pass per bit.

    From the highest bit down, points that agree in all higher bits stand together in their original order
    (a node). A 1 before a 0 in the same node is an inversion, met at this bit and at no other; then every
    node is split stably into its zeros and its ones.
    """
    n = codes.numel()
    position = torch.arange(n, device=codes.device)
    total = torch.zeros((), dtype=torch.int64, device=codes.device)
    for bit in reversed(range(int(codes.max()).bit_length())):
        one = (codes >> bit) & 1
        node = codes >> (bit + 1)
        first = torch.ones(n, dtype=torch.bool, device=codes.device)
        first[1:] = node[1:] != node[:-1]
        start = torch.where(first, position, 0).cummax(0).values
        ones_before = one.cumsum(0) - one
        ones_in_node = ones_before - ones_before[start]
        total += (ones_in_node * (1 - one)).sum()
        zeros_in_node = position - start - ones_in_node
        last = torch.ones(n, dtype=torch.bool, device=codes.device)
        last[:-1] = first[1:]
        node_zeros = (zeros_in_node + 1 - one)[last][first.cumsum(0) - 1]
        split = torch.empty_like(codes)
        split[start + torch.where(one == 1, node_zeros + ones_in_node, zeros_in_node)] = codes
        codes = split
    return int(total)
