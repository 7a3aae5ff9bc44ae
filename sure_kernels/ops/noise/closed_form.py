"""L_mu and L_far as two sweeps over the uncertainty maps.

`sums` makes, over all images, (sum of relu(x), #{x > 0}) for each pair (l, k) of levels, x = -(u_l - u_k)(m_l - m_k)
over near voxels, and (sum of u_0 + ... + u_L, number) over far ones. `finalise` turns them into the loss and one
coefficient each; `gradient` recomputes the signs of x from the maps:

    dL/du_l -= c_pair (m_l - m_k) [x > 0],   dL/du_k += the same,   dL/du = c_far far away

Between the sweeps nothing of full size is kept but the maps, the distance and the mask, all of them the caller's.
Maps, distance and mask are (N, V) here, levels (L + 1, N) with the clean map's zeros first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import Place, blocks
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


class _Piece:
    """What both sweeps need of some voxels of some images: u [L + 1, n, b], and 1 where a voxel is near or far."""

    def __init__(
        self, maps: Sequence[Tensor], gaps: Tensor, distance: Tensor, mask: Tensor | None, near: float, place: Place
    ) -> None:
        self.u = torch.stack([x[place] for x in maps]).to(gaps.dtype)
        d = distance[place]
        is_near, is_far = d <= near, d > near
        if mask is not None:
            is_near, is_far = is_near & mask[place], is_far & mask[place]
            # Replaced, not multiplied by 0: NaN in voxels that do not count must not reach the sums.
            self.u = torch.where(mask[place], self.u, 0.0)
        self.near, self.far = is_near.to(gaps.dtype), is_far.to(gaps.dtype)
        self.gap = gaps[:, place[0]].unsqueeze(2)  # [pairs, n, 1]

    def falls(self) -> Tensor:
        """relu(x) of each pair over near voxels, [pairs, n, b]."""
        u = self.u
        return torch.cat((u[:1] - u[1:], u[1:-1] - u[2:])).mul_(self.gap).mul_(self.near).relu_()


def _gaps(levels: Tensor) -> Tensor:
    """m_l - m_k of each pair, (pairs, N)."""
    return torch.cat((levels[1:] - levels[:1], levels[2:] - levels[1:-1]))


def _pieces(maps: Sequence[Tensor]) -> Iterator[Place]:
    # A few passes over several maps: pieces three times the usual size are faster than what stays in the cache.
    return blocks(maps[0], len(maps))


def sums(maps: Sequence[Tensor], levels: Tensor, distance: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    """(number_of_rows, 2) float64."""
    gaps = _gaps(levels)
    out = torch.zeros((len(gaps) + 1, 2), dtype=torch.float64, device=distance.device)
    for place in _pieces(maps):
        piece = _Piece(maps, gaps, distance, mask, terms.near, place)
        if terms.rising:
            x = piece.falls()
            out[:-1, 0] += x.sum((1, 2))
            out[:-1, 1] += x.sign_().sum((1, 2))
        if terms.far:
            out[-1, 0] += (piece.u.sum(0) * piece.far).sum()
            out[-1, 1] += piece.far.sum()
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
    gaps = _gaps(levels)
    first = 0 if clean else 1
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps[first:]]
    c = coefficients.to(gaps.dtype)
    for place in _pieces(maps):
        piece = _Piece(maps, gaps, distance, mask, terms.near, place)
        du = (piece.far * c[-1]).repeat(len(maps), 1, 1) if terms.far else torch.zeros_like(piece.u)
        if terms.rising:
            step = piece.falls().sign_().mul_(c[:-1, None, None] * piece.gap)
            from_clean, from_before = step[: len(maps) - 1], step[len(maps) - 1 :]
            du[1:] -= from_clean
            du[2:] -= from_before
            du[1:-1] += from_before
            if clean_rises:
                du[0] += from_clean.sum(0)
        for result, value in zip(out, du[first:], strict=True):
            result[place] = value
    return out
