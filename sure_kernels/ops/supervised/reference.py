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
from sure_kernels.ops.ranking.reference import covariance, pairwise_ranking

# The form of the supervision that is exact, over pairs of voxels of one label.
WITHIN_CLASS = "exact within class"


def covariance_supervision(
    u: Tensor,
    g: Tensor,
    selected: Tensor,
    *,
    relation: str = "decreasing",
    form: str = "covariance",
    margin: float = 0.0,
) -> Tensor:
    """C of each image, (N,), of u and g (N, V) over `selected` voxels; g is detached.

    `margin` is added to what relu is taken of. 0 where fewer than two voxels are selected or g (for
    `form="correlation"` also u) does not vary.
    """
    correlation = form == "correlation"
    points = ((u[i][on], g[i][on]) for i, on in enumerate(selected))
    return torch.stack([covariance(x, y, relation=relation, correlation=correlation, margin=margin) for x, y in points])


def supervision_terms(
    u: Tensor,
    g: Tensor,
    band: Tensor,
    counted: Tensor,
    labels: Tensor,
    *,
    supervision: str,
    relation: str,
    margin: float,
    process_group: object | None = None,
) -> tuple[Tensor, Tensor]:
    """(C or L_gu, F) of uncertainty u, gradient magnitude g, band and labels, all (N, V), over `counted` voxels."""
    on = (band == BOUNDARY) & counted
    if supervision in ("exact", WITHIN_CLASS):
        groups = labels if supervision == WITHIN_CLASS else None
        c = pairwise_ranking(u, g, on, groups, relation=relation, method="exact", process_group=process_group)
    else:
        per_image = covariance_supervision(u, g, on, relation=relation, form=supervision, margin=margin)
        images = all_reduced(torch.tensor(float(len(u)), dtype=u.dtype, device=u.device), process_group)
        c = global_sum(per_image.sum(), process_group) / images
    # Comparisons drop a NaN: it stays one.
    c = c + 0.0 * g[on].detach().sum()
    far = (band == FAR) & counted
    total = global_sum(torch.where(far, u, 0.0).sum(), process_group)
    return c, total / all_reduced(far.sum().to(u.dtype), process_group).clamp_min(1)
