"""Gradient-weighted supervision straight from its definition.

C = relu(Cov(u, g) / std(g)) over the boundary voxels of an image, averaged over images: the one-pass relaxation of
the pairwise ranking of uncertainty u against gradient magnitude g (Li et al., MICCAI 2025). F = the mean of u over
voxels far from every boundary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.distributed import all_reduced, global_sum
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR

# A spread below this share of the root mean square is rounding, and counts as none.
FLAT = 1e-6


def covariance_supervision(
    u: Tensor, g: Tensor, selected: Tensor, *, relation: str = "decreasing", form: str = "covariance"
) -> Tensor:
    """C of each image, (N,), of u and g (N, V) over `selected` voxels; g is detached.

    0 where fewer than two voxels are selected or g (for `form="correlation"` also u) does not vary.
    """
    g = g.detach().to(u.dtype)
    rows = [_one_image(u[i][selected[i]], g[i][selected[i]], relation, form) for i in range(len(u))]
    return torch.stack(rows)


def _one_image(u: Tensor, g: Tensor, relation: str, form: str) -> Tensor:
    nothing = 0.0 * u.sum()
    if u.numel() < 2 or not _varies(g) or (form == "correlation" and not _varies(u)):
        return nothing
    du, dg = u - u.mean(), g - g.mean()
    value = (du * dg).mean() / dg.square().mean().sqrt()
    if form == "correlation":
        value = value / du.square().mean().sqrt()
    return torch.relu(value if relation == "decreasing" else -value)


def _varies(x: Tensor) -> bool:
    return bool((x - x.mean()).square().mean() > FLAT**2 * x.square().mean())


def supervision_terms(
    u: Tensor,
    g: Tensor,
    band: Tensor,
    counted: Tensor,
    *,
    supervision: str,
    relation: str,
    process_group: object | None = None,
) -> tuple[Tensor, Tensor]:
    """(C, F) of uncertainty u, gradient magnitude g and band, all (N, V), over `counted` voxels."""
    per_image = covariance_supervision(u, g, (band == BOUNDARY) & counted, relation=relation, form=supervision)
    images = all_reduced(torch.tensor(float(len(u)), dtype=u.dtype, device=u.device), process_group)
    c = global_sum(per_image.sum(), process_group) / images
    far = (band == FAR) & counted
    total = global_sum(torch.where(far, u, 0.0).sum(), process_group)
    return c, total / all_reduced(far.sum().to(u.dtype), process_group).clamp_min(1)
