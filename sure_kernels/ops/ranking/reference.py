"""Pairwise ranking from its definition: all pairs, one set at a time.

    R(x, y) = sum_{i<j} relu((x_i - x_j)(y_i - y_j)) / #{i<j : (x_i - x_j)(y_i - y_j) > 0}

per image, 0 where there is no such pair, then the mean over images; groups pool their pairs and counts within an image
(Li et al., MICCAI 2025, L_gu and L_d over all pairs). Summed without the hinge, the pairs give n^2 Cov(x, y):
relu(Cov(x, y) / std(y)) is the relaxation of one pass. `relation="increasing"` penalises discordant pairs instead.
Gradients flow to x alone, and not through the count. O(n^2) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.distributed import all_reduced, global_sum

# A spread below this share of the root mean square is rounding, and counts as none.
FLAT = 1e-6


def violations(x: Tensor, y: Tensor, relation: str) -> tuple[Tensor, Tensor]:
    """(sum over unordered pairs of relu(product), number of pairs with a positive one) of one set (n,)."""
    y = y.detach() if relation == "decreasing" else -y.detach()
    dx, dy = x[:, None] - x, y[:, None] - y
    # Signs, not the product, decide: a product of tiny differences may round to 0.
    violated = torch.triu(torch.sign(dx.detach()) * torch.sign(dy) > 0, 1)
    return torch.where(violated, dx * dy, 0.0).sum(), violated.sum()


def covariance(
    x: Tensor,
    y: Tensor,
    groups: Tensor | None = None,
    *,
    relation: str = "decreasing",
    correlation: bool = False,
    margin: float = 0.0,
) -> Tensor:
    """relu(Cov(x, y) / std(y) + margin) of one set (n,), over std(x) too for the correlation; y is detached.

    Population moments, about the mean of each of the `groups` (n,) where given. 0 for fewer than two points and where y
    (for the correlation also x) does not vary.
    """
    y = y.detach().to(x.dtype)
    nothing = 0.0 * x.sum()
    if x.numel() < 2:
        return nothing
    dx, dy = _centred(x, groups), _centred(y, groups)
    if not _varies(y, dy) or (correlation and not _varies(x, dx)):
        return nothing
    value = (dx * dy).mean() / dy.square().mean().sqrt()
    if correlation:
        value = value / dx.square().mean().sqrt()
    return torch.relu((value if relation == "decreasing" else -value) + margin)


def _centred(x: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        return x - x.mean()
    member = (groups[:, None] == groups).to(x.dtype)
    return x - (member @ x) / member.sum(1)


def _varies(x: Tensor, centred: Tensor) -> bool:
    # Negated, so that NaN comes through.
    return not bool(centred.square().mean() <= FLAT**2 * x.square().mean())


def pairwise_ranking(
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    groups: Tensor | None,
    *,
    relation: str,
    method: str,
    process_group: object | None = None,
) -> Tensor:
    """The mean over images of `exact` or `covariance`, of rows (N, n)."""
    per_image = []
    for i in range(len(values)):
        chosen = torch.ones_like(values[i], dtype=torch.bool) if mask is None else mask[i]
        x, y = values[i][chosen], scores[i][chosen].to(values.dtype)
        group = None if groups is None else groups[i][chosen]
        if method == "covariance":
            per_image.append(covariance(x, y, group, relation=relation))
            continue
        sets = [slice(None)] if group is None else [group == g for g in group.unique()]
        total, count = 0.0 * x.sum(), 0
        for members in sets:
            of_set, pairs = violations(x[members], y[members], relation)
            total, count = total + of_set, count + int(pairs)
        per_image.append(total / max(count, 1))
    images = all_reduced(torch.tensor(float(len(values)), dtype=values.dtype, device=values.device), process_group)
    return global_sum(torch.stack(per_image).sum(), process_group) / images
