"""Rank statistics of two quantities over sets of voxels: UCC and UR.

Both are exact for any number of points: O(n log n) time, O(n) memory, ties told apart exactly, all rows and groups at
once. Ranks are held doubled, as integers, and their products added up as integers: results do not depend on the order
of the points.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sure_kernels.backends import get_backend
from sure_kernels.kernel_lib.ordering import order_bits
from sure_kernels.metrics.points import as_points, as_result, match, match_boolean, match_groups, rows
from sure_kernels.metrics.state import CaseMean
from sure_kernels.metrics.undefined import Undefined, answer, scored
from sure_kernels.ops.ranking.closed_form import Sets, sets_of
from sure_kernels.ops.ranking.op import concordant_pairs
from sure_kernels.validation import check_choice, check_compat

# PriUS: pairs tied in one quantity whose other one differs by less follow the relation.
OFFICIAL_TOLERANCE = 1e-4
# Products of ranks are added up in two parts of so many bits, so that int64 holds sums over 10^8 points.
_LOW_BITS = 20


def uncertainty_correlation(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    compat: Literal["official"] | None = None,
    return_reason: bool = False,
) -> Any:
    """UCC: Spearman's rank correlation of `x` and `y`, average ranks for ties.

    Args:
        x: maps (N, 1, *spatial), sets of points (N, n) or one set (n,); floating point.
        y: the same shape as x.
        mask: boolean (0/1 numbers accepted), True = counts; the shape of x, maps also (N, *spatial).
        groups: integers of the shape of mask, for example the label: correlate within each group, then
            average over the groups of a row where the correlation is defined.
        compat: "official" ranks ties by their order in memory, as the published programs do (theirs is an unstable
            sort, so that where values tie their figures depend on the machine).
        return_reason: also return why it is NaN, see `Undefined`.

    Returns:
        float64 (N,), 0-d for one set, each in [-1, 1]; NaN for fewer than two points, where x or y is
        constant, and where a counted value is NaN.

    Raises:
        TypeError: dtype of x, y or groups. ValueError: shapes that differ, a mask that is not 0/1, an unknown compat.
    """
    official = check_compat(compat)
    sets, x = _sets(x, y, mask, groups)
    points = sets.sizes
    ranks = [_centred_ranks(values, sets, official) for values in (sets.value, sets.score)]
    covariance, variance_x, variance_y = (
        _product_sums(a, b, sets) for a, b in ((ranks[0], ranks[1]), (ranks[0],) * 2, (ranks[1],) * 2)
    )
    per_set = (covariance / (variance_x.sqrt() * variance_y.sqrt())).clamp(-1, 1)
    defined = ~per_set.isnan()  # 0/0 of a constant or a single point
    number = sets.by_row(defined.long())
    value = sets.by_row(per_set.where(defined, 0)) / number
    result = scored(
        value,
        (Undefined.NAN_INPUT, _any(sets, sets.value.isnan() | sets.score.isnan())),
        (Undefined.NO_VOXEL, sets.by_row(points) == 0),
        (Undefined.FEW_POINTS, sets.by_row((points > 1).long()) == 0),
        (Undefined.CONSTANT, number == 0),
    )
    return answer((as_result(t, x) for t in result), return_reason)


def uncertainty_ratio(
    x: Tensor,
    y: Tensor,
    *,
    relation: Literal["decreasing", "increasing"] = "decreasing",
    ties: Literal["exclude", "official"] = "exclude",
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    compat: Literal["official"] | None = None,
    return_reason: bool = False,
) -> Any:
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
        compat: "official" is what the published programs compute over all pairs. Without groups (SURE) that is
            ties="official". With groups (PriUS) a pair tied in one quantity follows as well where the other differs
            by less than 1e-4, and the ratios of the groups of two points and more are averaged.
        return_reason: also return why it is NaN, see `Undefined`.

    Returns:
        float64 (N,), 0-d for one set, each in [0, 1]; NaN where no pair counts or a counted value is NaN.

    Raises:
        TypeError: dtype of x, y or groups. ValueError: shapes that differ, a mask that is not 0/1, an
            unknown relation, ties or compat.
    """
    check_choice(relation, "relation", ("decreasing", "increasing"))
    check_choice(ties, "ties", ("exclude", "official"))
    official = check_compat(compat)
    sets, x = _sets(x, y, mask, groups)
    total = sets.sizes * (sets.sizes - 1) // 2
    of_x, of_y = _codes(sets.value, sets), _codes(sets.score, sets)
    both = _tied_pairs(_joint(of_x, of_y), sets)
    concordant = concordant_pairs(sets, get_backend(sets.value, "pairwise_ranking_loss"))
    untied = total - _tied_pairs(of_x, sets) - _tied_pairs(of_y, sets) + both
    follow, among = concordant if relation == "increasing" else untied - concordant, untied
    if ties == "official" or official:
        follow, among = follow + both, total
    if official and groups is not None:
        follow = follow + _nearly_tied_pairs(of_x, sets.score, sets)
        follow = follow + _nearly_tied_pairs(of_y, sets.value, sets)
        usable = sets.by_row((total > 0).long())
        value = sets.by_row(torch.where(total > 0, follow.double() / total, 0.0)) / usable
    else:
        value = sets.by_row(follow).double() / sets.by_row(among)
    result = scored(
        value,
        (Undefined.NAN_INPUT, _any(sets, sets.value.isnan() | sets.score.isnan())),
        (Undefined.NO_VOXEL, sets.by_row(sets.sizes) == 0),
        (Undefined.FEW_POINTS, sets.by_row(total) == 0),
        (Undefined.NO_PAIR, sets.by_row(among) == 0),
    )
    return answer((as_result(t, x) for t in result), return_reason)


class UncertaintyCorrelation(CaseMean):
    """The mean of `uncertainty_correlation` over the cases where it is defined: ranks have no sums to pool."""

    def __init__(self, *, compat: Literal["official"] | None = None) -> None:
        check_compat(compat)
        super().__init__(uncertainty_correlation, compat=compat)


class UncertaintyRatio(CaseMean):
    """The mean of `uncertainty_ratio` over the cases where it is defined; pairs never cross cases."""

    def __init__(
        self,
        *,
        relation: Literal["decreasing", "increasing"] = "decreasing",
        ties: Literal["exclude", "official"] = "exclude",
        compat: Literal["official"] | None = None,
    ) -> None:
        check_choice(relation, "relation", ("decreasing", "increasing"))
        check_choice(ties, "ties", ("exclude", "official"))
        check_compat(compat)
        super().__init__(uncertainty_ratio, relation=relation, ties=ties, compat=compat)


def _sets(x: object, y: object, mask: object, groups: object) -> tuple[Sets, Tensor]:
    """The sets of points that the arguments stand for, and the checked `x`."""
    x = as_points(x, "x")
    y = match(as_points(y, "y"), "y", x, "x")
    counted = None if mask is None else match_boolean(mask, "mask", x, "x")
    group = None if groups is None else match_groups(groups, x, "x")
    return sets_of(rows(x), y, counted, group, "decreasing"), x


def _any(sets: Sets, condition: Tensor) -> Tensor:
    """(N,): whether a row has a point (P,) where the condition holds."""
    return sets.by_row(sets.sum(condition.long())) > 0


def _codes(values: Tensor, sets: Sets) -> Tensor:
    """Codes 0, 1, 2, ... (P,) of the distinct values, set by set and ascending in each; -0.0 is 0.0."""
    code = torch.unique(order_bits(values), return_inverse=True)[1]
    if len(sets.sizes) == 1:
        return code
    return _joint(sets.spread(torch.arange(len(sets.sizes), device=values.device)), code)


def _joint(first: Tensor, second: Tensor) -> Tensor:
    """Dense codes of pairs of codes (P,), ordered by the first."""
    base = int(second.max()) + 1 if len(second) else 1
    return torch.unique(first * base + second, return_inverse=True)[1]


def _centred_ranks(values: Tensor, sets: Sets, by_position: bool) -> Tensor:
    """2 (rank - mean rank) of every point in its set, (P,) int64: ranks averaged over ties, or ties by position."""
    code = _codes(values, sets)
    start, size = sets.spread(sets.starts), sets.spread(sets.sizes)
    if by_position:
        order = code.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return 2 * (place - start) - (size - 1)
    counts = torch.bincount(code)
    last = counts.cumsum(0) - 1
    return (2 * last - counts + 1)[code] - 2 * start - (size - 1)


def _product_sums(a: Tensor, b: Tensor, sets: Sets) -> Tensor:
    """(sets,) float64: sums of the products of integers (P,), exact until the last step."""
    product = a * b
    high, low = product >> _LOW_BITS, product & ((1 << _LOW_BITS) - 1)
    return sets.sum(high).double() * 2.0**_LOW_BITS + sets.sum(low).double()


def _tied_pairs(code: Tensor, sets: Sets) -> Tensor:
    """(sets,): pairs of points with equal dense codes (P,), which never cross sets."""
    counts = torch.bincount(code)
    # Each of the c points of a code has (c - 1) partners.
    return sets.sum((counts - 1)[code]) // 2


def _nearly_tied_pairs(code: Tensor, other: Tensor, sets: Sets) -> Tensor:
    """(sets,): pairs with equal codes whose other quantity differs, by less than the published tolerance."""
    distinct, dense = torch.unique(other.double() + 0.0, return_inverse=True)
    reach = torch.searchsorted(distinct, distinct + OFFICIAL_TOLERANCE)  # the first too far above
    base = len(distinct) + 1
    key = code * base + dense
    ordered = key.sort().values
    near_end, tie_end = (torch.searchsorted(ordered, target) for target in (code * base + reach[dense], key + 1))
    return sets.sum(near_end - tie_end)
