"""The noise-uncertainty loss straight from its formulas (Li et al., MICCAI 2025).

Uncertainty maps u_0 (clean), u_1, ..., u_L at noise levels m_0 = 0, m_1, ..., m_L:

    L_mu  = sum over pairs (l, k) of V(-(u_l - u_k)(m_l - m_k)),   V(x) = sum relu(x) / #{x > 0}, d <= near
    L_far = mean of u_0 + u_1 + ... + u_L over d > near

The pairs are every map with the clean one and with its predecessor. The third term, L_d, is the pairwise ranking of
u_l - u_0 against d, whose reference is that of `pairwise_ranking_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sure_kernels.kernel_lib.distributed import all_reduced, global_sum


def level_pairs(maps: int) -> list[tuple[int, int]]:
    """(l, k): every map from 1 on with the clean one (0), then every map from 2 on with its predecessor."""
    return [(i, 0) for i in range(1, maps)] + [(i, i - 1) for i in range(2, maps)]


def violation(x: Tensor, counted: Tensor, process_group: object | None = None) -> Tensor:
    """V: the mean of the positive entries of `x` among the `counted` ones, 0 where there is none."""
    x = torch.where(counted, x, 0.0)
    number = all_reduced((x > 0).sum().to(x.dtype), process_group)
    return global_sum(torch.relu(x).sum(), process_group) / number.clamp_min(1)


def rising_term(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    counted: Tensor,
    *,
    near: float,
    official: bool,
    process_group: object | None = None,
) -> Tensor:
    """L_mu of L + 1 maps (N, V), the first of them clean and without gradient unless `official`.

    `levels` is (L + 1, N), the first row 0; `distance` and `counted` are (N, V).
    """
    u = list(maps) if official else [maps[0].detach(), *maps[1:]]
    on = counted & (distance <= near)
    terms = []
    for i, j in level_pairs(len(u)):
        gap = (levels[i] - levels[j]).unsqueeze(1)
        terms.append(violation(-(u[i] - u[j]) * gap, on, process_group))
    return torch.stack(terms).sum()


def far_term(
    maps: Sequence[Tensor], distance: Tensor, counted: Tensor, *, near: float, process_group: object | None = None
) -> Tensor:
    """L_far of maps (N, V); 0 where no voxel is far."""
    far = counted & (distance > near)
    number = all_reduced(far.sum().to(maps[0].dtype), process_group)
    total = torch.stack([torch.where(far, u, 0.0).sum() for u in maps]).sum()
    return global_sum(total, process_group) / number.clamp_min(1)
