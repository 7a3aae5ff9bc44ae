"""L_mu and L_far as two sweeps over the uncertainty maps.

`sums` makes, over all images, (sum of relu(x), #{x > 0}) for each pair (l, k) of levels, x = -(u_l - u_k)(m_l - m_k)
over near voxels, and (sum of u_0 + ... + u_L, number) over far ones. `finalise` turns them into the loss and one
coefficient each; `gradient` recomputes the signs of x from the maps:

    dL/du_l -= c_pair (m_l - m_k) [x > 0],   dL/du_k += the same,   dL/du = c_far far away

Between the sweeps nothing of full size is kept but the maps, the distance and the mask, all of them the caller's.
Maps, distance and mask are (N, V) here, levels (L + 1, N) with the clean map's zeros first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import voxel_slices, working_dtype
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.ops.noise.reference import level_pairs


class Terms(NamedTuple):
    """Up to which distance a voxel is near, and which of L_mu and L_far are wanted: the other's sums are 0."""

    near: float
    rising: bool
    far: bool


class Finalised(NamedTuple):
    """The weighted loss, (L_mu, L_far), and the gradient's coefficient for each row of the sums, all float64."""

    loss: Tensor
    terms: Tensor
    coefficients: Tensor


def number_of_rows(maps: int) -> int:
    """Rows of the sums: the pairs of levels, then the far voxels."""
    return len(level_pairs(maps)) + 1


def _rows_per_voxel(maps: Sequence[Tensor]) -> int:
    """Temporaries a voxel."""
    return len(maps) + 3


def _counted(condition: Tensor, mask: Tensor | None, image: int, voxels: slice) -> Tensor:
    return condition if mask is None else condition & mask[image, voxels]


def sums(maps: Sequence[Tensor], levels: Tensor, distance: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    """(number_of_rows, 2) float64."""
    pairs = level_pairs(len(maps))
    dtype = working_dtype(maps[0].dtype)
    out = torch.zeros((len(pairs) + 1, 2), dtype=torch.float64, device=distance.device)
    for image, voxels in voxel_slices(distance.unsqueeze(1), _rows_per_voxel(maps)):
        d = distance[image, voxels]
        u = [x[image, voxels].to(dtype) for x in maps]
        if terms.rising:
            near = _counted(d <= terms.near, mask, image, voxels)
            found = []
            for i, j in pairs:
                x = torch.where(near, (u[j] - u[i]) * (levels[i, image] - levels[j, image]), 0.0)
                found += [torch.relu(x).sum().double(), (x > 0).sum().double()]
            out[:-1] += torch.stack(found).view(-1, 2)
        if terms.far:
            far = _counted(d > terms.near, mask, image, voxels)
            total = torch.stack([torch.where(far, x, 0.0).sum() for x in u]).double().sum()
            out[-1] += torch.stack((total, far.sum().double()))
    return out


def finalise(totals: Tensor, rising_weight: float, far_weight: float, process_group: Any | None) -> Finalised:
    """From the sums of this rank; the coefficients follow DistributedDataParallel's averaging."""
    value, number = all_reduced(totals, process_group).unbind(1)
    safe = number.clamp_min(1)
    mean = value / safe
    weight = torch.full_like(mean, rising_weight)
    weight[-1] = far_weight
    return Finalised(
        (weight * mean).sum(),
        torch.stack((mean[:-1].sum(), mean[-1])),
        weight * world_size(process_group) / safe,
    )


def gradient(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    mask: Tensor | None,
    coefficients: Tensor,
    terms: Terms,
    clean: bool,
    clean_rises: bool,
) -> list[Tensor]:
    """dL/du of each map in its dtype; without the clean one's unless `clean`, which L_mu reaches if `clean_rises`."""
    dtype = working_dtype(maps[0].dtype)
    first = 0 if clean else 1
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps[first:]]
    c = coefficients.to(dtype)
    for image, voxels in voxel_slices(distance.unsqueeze(1), _rows_per_voxel(maps)):
        d = distance[image, voxels]
        u = [x[image, voxels].to(dtype) for x in maps]
        far = (
            torch.where(_counted(d > terms.near, mask, image, voxels), c[-1], 0.0)
            if terms.far
            else torch.zeros_like(u[0])
        )
        du = [far] * len(maps)
        if terms.rising:
            near = _counted(d <= terms.near, mask, image, voxels)
            for row, (i, j) in enumerate(level_pairs(len(maps))):
                gap = levels[i, image] - levels[j, image]
                step = torch.where(near & ((u[j] - u[i]) * gap > 0), c[row] * gap, 0.0)
                du[i] = du[i] - step
                if j > 0 or clean_rises:
                    du[j] = du[j] + step
        for result, value in zip(out, du[first:], strict=True):
            result[image, voxels] = value
    return out
