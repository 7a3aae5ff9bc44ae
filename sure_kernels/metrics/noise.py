"""Does uncertainty rise with the noise in the image?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import serial_slices
from sure_kernels.metrics.points import as_points, as_result, match, match_boolean
from sure_kernels.metrics.state import SumState
from sure_kernels.metrics.undefined import Scored, Undefined, answer, scored
from sure_kernels.validation import (
    FLOAT_DTYPES,
    INT_DTYPES,
    check_count,
    check_distances,
    check_number,
    check_same_device,
    check_sequence,
    values_checked,
)

MOST_LEVELS = 2**16  # far above what is of use


class Response(NamedTuple):
    """How uncertainty answers to noise."""

    share: Tensor
    """Share of near voxels whose uncertainty rises from each level to the next: (..., levels - 1)."""
    correlation: Tensor
    """Spearman's correlation of uncertainty and level, averaged over the near voxels where it varies: (...)."""


def noise_response(
    maps: Sequence[Tensor],
    levels: Sequence[float | Tensor],
    *,
    distance: Tensor,
    near: float = 4.0,
    mask: Tensor | None = None,
    return_reason: bool = False,
) -> Any:
    """Does the uncertainty near a boundary rise with the noise? (Li et al., MICCAI 2025, second principle)

    From each level to the next a voxel's uncertainty follows where it changes in the direction that the level changes
    in; where it stays the same it does not. The correlation is taken over the levels at each voxel, average ranks for
    ties, and averaged over voxels; voxels whose uncertainty is the same at every level have none and are left out.

    Args:
        maps: uncertainty at each level, two maps or more: (N, 1, *spatial), (N, n) or (n,), floating point.
        levels: the noise level of each map: numbers, or tensors (N,) with one for each case.
        distance: to the nearest boundary, floating point, the shape of the maps, these also (N, *spatial).
        near: voxels at most so far from a boundary count.
        mask: boolean (0/1 numbers accepted), True = counts; the shape of distance.
        return_reason: also return, as a Response, why they are NaN, see `Undefined`.

    Returns:
        Response(share, correlation), float64: (N, levels - 1) and (N,), for single sets (levels - 1,) and 0-d. NaN
        where no voxel is near or a counted value is NaN; shares also where two levels are equal, the correlation also
        for fewer than three levels and where nothing varies.

    Raises:
        TypeError: dtypes. ValueError: shapes or numbers of maps and levels that differ, a mask that is not 0/1.
    """
    sums, points = _sums(maps, levels, distance, near, mask)
    result = [_scored(**{name: t[row] for name, t in sums.items()}) for row in range(len(sums["near"]))]
    response, reason = (
        Response(*(as_result(torch.stack(t), points) for t in zip(*part, strict=True)))
        for part in zip(*result, strict=True)
    )
    return answer((response, reason), return_reason)


class NoiseResponse(SumState):
    """`noise_response` over all near voxels seen, at a fixed number of levels: `compute` gives a Response."""

    def __init__(self, *, num_levels: int) -> None:
        steps = check_count(num_levels, "num_levels", minimum=2, maximum=MOST_LEVELS) - 1
        super().__init__(rising=(steps,), changing=(steps,), near=(), undefined=(), correlation=(), varying=())

    def update(
        self,
        maps: Sequence[Tensor],
        levels: Sequence[float | Tensor],
        *,
        distance: Tensor,
        near: float = 4.0,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch; arguments and errors of `noise_response`."""
        sums, _ = _sums(maps, levels, distance, near, mask)
        if len(levels) - 1 != len(self.sums["rising"]):
            raise ValueError(f"levels: expected {len(self.sums['rising']) + 1} of them, got {len(levels)}")
        self._add(**{name: t.sum(0) for name, t in sums.items()})

    def _result(self, **sums: Tensor) -> tuple[Response, Response]:
        return _scored(**sums)


def _scored(
    rising: Tensor, changing: Tensor, near: Tensor, undefined: Tensor, correlation: Tensor, varying: Tensor
) -> tuple[Response, Response]:
    reasons = ((Undefined.NAN_INPUT, undefined > 0), (Undefined.NO_VOXEL, near == 0))
    share: Scored = scored(
        rising / changing,
        *((code, holds.expand_as(rising)) for code, holds in reasons),
        (Undefined.CONSTANT, changing == 0),
    )
    few = torch.full_like(near, rising.shape[-1] < 2, dtype=torch.bool)
    mean = scored(correlation / varying, *reasons, (Undefined.FEW_LEVELS, few), (Undefined.CONSTANT, varying == 0))
    return Response(share.value, mean.value), Response(share.reason, mean.reason)


def _sums(
    maps: Sequence[Tensor], levels: Sequence[float | Tensor], distance: object, near: float, mask: object
) -> tuple[dict[str, Tensor], Tensor]:
    """The sums of every row, and the first map.

    rising, changing (N, levels - 1): voxels that follow the level, near voxels of rows where it changes at all.
    near, undefined (N,): near voxels, and those with a NaN. correlation, varying (N,): sum over voxels, their number.
    """
    check_sequence(maps, "maps", "tensors")
    check_sequence(levels, "levels", "numbers")
    if len(maps) < 2 or len(maps) != len(levels):
        raise ValueError(
            f"maps, levels: expected two or more of each and equally many, got {len(maps)} and {len(levels)}"
        )
    first = as_points(maps[0], "maps[0]")
    u = [match(as_points(m, f"maps[{i}]"), f"maps[{i}]", first, "maps[0]").detach() for i, m in enumerate(maps)]
    counted = None if mask is None else match_boolean(mask, "mask", first, "maps[0]")
    d = match(distance, "distance", first, "maps[0]")
    if not d.is_floating_point():
        raise TypeError(f"distance: expected floating point, got {d.dtype}")
    check_distances(d, counted)
    close = d <= check_number(near, "near")
    if counted is not None:
        close = close & counted
    n = len(u[0])
    level = torch.stack([_level(value, i, n, first) for i, value in enumerate(levels)])  # (levels, N)
    direction = level.diff(dim=0).sign().T  # (N, levels - 1)
    level_rank = _centred_ranks(level).T  # (N, levels)

    zero = torch.zeros(n, dtype=torch.float64, device=first.device)
    sums = {name: zero.clone() for name in ("near", "undefined", "correlation", "varying")}
    sums["rising"] = torch.zeros_like(direction)
    for row, voxels in serial_slices(u[0], len(u)):
        chosen = close[row, voxels]
        values = torch.stack([m[row, voxels][chosen] for m in u]).double()  # (levels, voxels)
        sums["near"][row] += values.shape[1]
        sums["undefined"][row] += values.isnan().any(0).sum()
        # Compared, not subtracted: the sign of a tiny difference is kept.
        change = (values[1:] > values[:-1]).double() - (values[1:] < values[:-1]).double()
        sums["rising"][row] += (change * direction[row, :, None] > 0).sum(1)
        rank = _centred_ranks(values)
        scale = rank.square().sum(0) * level_rank[row].square().sum()
        varies = scale > 0
        sums["correlation"][row] += ((level_rank[row] @ rank)[varies] * scale[varies].rsqrt()).sum()
        sums["varying"][row] += varies.sum()
    sums["changing"] = sums["near"][:, None] * direction.abs()
    return sums, first


def _level(value: object, i: int, n: int, like: Tensor) -> Tensor:
    """(N,) float64."""
    name = f"levels[{i}]"
    if isinstance(value, Tensor):
        if value.dtype not in (*FLOAT_DTYPES, *INT_DTYPES):
            raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
        if values_checked(value) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
        if value.ndim == 0:
            return value.to(like.device, torch.float64).expand(n)
        check_same_device(value, name, like, "maps[0]")
        if value.shape != (n,):
            raise ValueError(f"{name}: expected a number or shape {(n,)}, got {tuple(value.shape)}")
        return value.double()
    number = check_number(value, name, minimum=-torch.inf)
    return torch.full((n,), number, dtype=torch.float64, device=like.device)


def _centred_ranks(x: Tensor) -> Tensor:
    """Average ranks along the first axis (L, n), minus their mean; exact halves. O(L^2) comparisons: L is small."""
    ranks = torch.zeros_like(x, dtype=torch.float64)
    for other in x:
        ranks += (x > other).double() - (x < other).double()
    return ranks / 2
