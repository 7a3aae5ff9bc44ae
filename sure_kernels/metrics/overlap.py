"""Does high uncertainty lie where the errors are?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sure_kernels.metrics.detection import PooledErrors, check_points
from sure_kernels.metrics.undefined import Scored, Undefined, answer, scored
from sure_kernels.ops.histograms.reference import fine_bin, thresholds


def uncertainty_error_overlap(
    uncertainty: Tensor, error: Tensor, *, mask: Tensor | None = None, return_reason: bool = False
) -> Any:
    """UEO: the largest Dice of {error} and {uncertainty > t} over t = 0.01, 0.02, ..., 0.99.

    From histograms with edges at the thresholds, so exact: O(n) time, constant memory.

    Args:
        uncertainty: maps (N, 1, *spatial), sets of points (N, n) or one set (n,); floating point, meant to
            lie in [0, 1].
        error: boolean (0/1 numbers accepted), True = wrong; the shape of uncertainty, maps also
            (N, *spatial), or (N, C, *spatial) for C kinds of error at once, for example one a class.
        mask: boolean, True = counts; the shape of uncertainty, maps also (N, *spatial).
        return_reason: also return why it is NaN, see `Undefined`.

    Returns:
        float64 (N,), (N, C) for C kinds of error, 0-d for one set, each in [0, 1]; NaN where no counted voxel is
        wrong (there is nothing to overlap with) and where a counted uncertainty is NaN.

    Raises:
        TypeError: dtype of uncertainty. ValueError: shapes that differ, an error or mask that is not 0/1.
    """
    points = check_points(uncertainty, error, mask)
    errors, undefined = points.histograms()
    result = ueo_of(errors, undefined[:, None].expand(errors.shape[:2]))
    return answer(map(points.shaped, result), return_reason)


class UncertaintyErrorOverlap(PooledErrors):
    """`uncertainty_error_overlap` over all voxels seen: `compute` is 0-d, or (C,) with `num_classes`."""

    def _scored(self, errors: Tensor, undefined: Tensor) -> Scored:
        return ueo_of(errors, undefined)


def ueo_of(errors: Tensor, undefined: Tensor) -> Scored:
    """From fine histograms (..., 2, BINS) and the number of NaN (...)."""
    first_above = fine_bin(thresholds().nextafter(torch.ones((), dtype=torch.float64))).to(errors.device)
    errors = errors.double()
    wrong = errors[..., 1, :]
    uncertain, both = (x.flip(-1).cumsum(-1).flip(-1)[..., first_above] for x in (errors.sum(-2), wrong))
    total = wrong.sum(-1)
    dice = 2 * both / (total[..., None] + uncertain)
    return scored(
        dice.amax(-1),
        (Undefined.NAN_INPUT, undefined > 0),
        (Undefined.NO_VOXEL, errors.sum((-1, -2)) == 0),
        (Undefined.NO_ERROR, total == 0),
    )
