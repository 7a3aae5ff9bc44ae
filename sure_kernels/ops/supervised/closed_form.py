"""The supervision's value and coefficients from the sums that the evidential sweep made along the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.distributed import all_reduced
from sure_kernels.ops.evidential.closed_form import SUPERVISION_SUMS
from sure_kernels.ops.ranking.reference import FLAT


class Supervision(NamedTuple):
    """How uncertainty is supervised: weights of C and F, the form of C, the sign it penalises, its margin."""

    gradient_weight: float
    far_weight: float
    form: str
    relation: str
    margin: float


class Finalised(NamedTuple):
    """The weighted sum of C and F, (C, F), and the second sweep's coefficients (N, 3) and means (N, 2), float64."""

    loss: Tensor
    terms: Tensor
    coefficients: Tensor
    means: Tensor


def finalise(sums: Tensor, supervision: Supervision, process_group: Any | None) -> Finalised:
    """From the sums of each image (N, number_of_sums); C is per image, F over all images (and ranks)."""
    n, g1, g2, u1, gu, u2, far_n, far_u = sums[:, -SUPERVISION_SUMS:].unbind(1)
    safe = n.clamp_min(1)
    g_mean, u_mean = g1 / safe, u1 / safe
    g_var, g_some = _variance(g2 / safe, g_mean)
    u_var, u_some = _variance(u2 / safe, u_mean)
    cov = gu / safe - g_mean * u_mean
    sign = 1.0 if supervision.relation == "decreasing" else -1.0
    usable = (n >= 2) & g_some
    scale = g_var.rsqrt()
    if supervision.form == "correlation":
        usable = usable & u_some
        scale = scale * u_var.rsqrt()
    value = sign * cov * scale
    active = (usable & (value > -supervision.margin)).to(sums.dtype)

    images = sums.new_full((1,), len(n))  # filled where it lies: the host need not wait
    joined = all_reduced(
        torch.cat((images, torch.stack(((active * (value + supervision.margin)).sum(), far_n.sum(), far_u.sum())))),
        process_group,
    )
    c = joined[1] / joined[0]
    some_far = joined[2].clamp_min(1)
    f = joined[3] / some_far

    c_g = supervision.gradient_weight * active * sign * scale / (joined[0] * safe)
    if supervision.form == "correlation":
        c_u = -supervision.gradient_weight * active * value / (joined[0] * safe * u_var)
    else:
        c_u = torch.zeros_like(c_g)
    c_far = (supervision.far_weight / some_far).expand_as(c_g)
    return Finalised(
        supervision.gradient_weight * c + supervision.far_weight * f,
        torch.stack((c, f)),
        torch.stack((c_g, c_u, c_far), 1),
        torch.stack((g_mean, u_mean), 1),
    )


def _variance(square_mean: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The variance (1 where there is none to rounding) and whether there is any."""
    variance = square_mean - mean.square()
    some = variance > FLAT**2 * square_mean
    return torch.where(some, variance, 1.0), some
