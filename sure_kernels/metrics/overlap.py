"""Does high uncertainty lie where the errors are?"""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.metrics.points import as_points, as_result, match_boolean, rows
from sure_kernels.metrics.state import SumState

THRESHOLDS = 99


def uncertainty_error_overlap(uncertainty: Tensor, error: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """UEO: the largest Dice of {error} and {uncertainty > t} over t = 0.01, 0.02, ..., 0.99.

    From two histograms with edges at the thresholds, so exact there: O(n) time, constant memory.

    Args:
        uncertainty: maps (N, 1, *spatial), sets of points (N, n) or one set (n,); floating point, meant to
            lie in [0, 1].
        error: boolean (0/1 numbers accepted), True = wrong; the shape of uncertainty, maps also
            (N, *spatial).
        mask: as error, True = counts.

    Returns:
        float64 (N,), 0-d for one set, each in [0, 1]; NaN where no counted voxel is wrong (there is nothing
        to overlap with) and where a counted uncertainty is NaN.

    Raises:
        TypeError: dtype of uncertainty. ValueError: shapes that differ, an error or mask that is not 0/1.
    """
    return as_result(_ueo(_histograms(uncertainty, error, mask)), as_points(uncertainty, "uncertainty"))


class UncertaintyErrorOverlap(SumState):
    """`uncertainty_error_overlap` over all voxels seen: `update` takes its arguments, `compute` is 0-d."""

    def __init__(self) -> None:
        super().__init__((2, THRESHOLDS + 1))

    def update(self, uncertainty: Tensor, error: Tensor, *, mask: Tensor | None = None) -> None:
        """Add a batch; arguments and errors of `uncertainty_error_overlap`."""
        self._add(_histograms(uncertainty, error, mask).sum(0))

    def _result(self, sums: Tensor) -> Tensor:
        return _ueo(sums[None])[0]


def _histograms(uncertainty: Tensor, error: Tensor, mask: Tensor | None) -> Tensor:
    """(N, 2, 100): voxels with exactly i thresholds below their uncertainty; all of them, and the wrong."""
    points = as_points(uncertainty, "uncertainty")
    wrong = match_boolean(error, "error", points, "uncertainty")
    values = rows(points).double()
    counts = torch.ones_like(values)
    if mask is not None:
        counts = match_boolean(mask, "mask", points, "uncertainty").double()
    thresholds = torch.arange(1, THRESHOLDS + 1, dtype=torch.float64, device=values.device) / (THRESHOLDS + 1)
    below = torch.bucketize(values, thresholds)
    counts = torch.where(values.isnan() & (counts > 0), torch.nan, counts)
    sums = [values.new_zeros(values.shape[0], THRESHOLDS + 1) for _ in range(2)]
    return torch.stack([s.scatter_add_(1, below, w) for s, w in zip(sums, (counts, counts * wrong), strict=True)], 1)


def _ueo(histograms: Tensor) -> Tensor:
    """(N, 2, 100) -> (N,)."""
    errors = histograms[:, 1].sum(-1)
    uncertain, both = histograms.flip(-1).cumsum(-1).flip(-1)[..., 1:].unbind(1)
    dice = 2 * both / (errors[:, None] + uncertain)
    return torch.where(errors == 0, torch.nan, dice.amax(-1))
