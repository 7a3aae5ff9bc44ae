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
    """Some voxels of some images: the maps [n, b], and 1 where a voxel is near or far.

    On a CPU torch compares in place, into floats, several times faster than into booleans.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        levels: Tensor,
        distance: Tensor,
        mask: Tensor | None,
        near: float,
        place: Place,
    ) -> None:
        self.u = [x[place].to(levels.dtype) for x in maps]
        d = distance[place]
        self.near, self.far = d.clone().le_(near).to(levels.dtype), d.clone().gt_(near).to(levels.dtype)
        if mask is not None:
            self.near.mul_(mask[place])
            self.far.mul_(mask[place])
            # Replaced, not multiplied by 0: NaN in voxels that do not count must not reach the sums.
            self.u = [torch.where(mask[place], u, 0.0) for u in self.u]
        self._levels = levels[:, place[0], None]  # [L + 1, n, 1]

    def gap(self, i: int, k: int) -> Tensor:
        """m_i - m_k, [n, 1]."""
        return self._levels[i] - self._levels[k]

    def fall(self, i: int, k: int, gap: Tensor) -> Tensor:
        """x of a pair of levels over near voxels, [n, b]."""
        return (self.u[k] - self.u[i]).mul_(gap).mul_(self.near)


def _pieces(maps: Sequence[Tensor]) -> Iterator[Place]:
    # A few passes over several maps: pieces three times the usual size are faster than what stays in the cache.
    return blocks(maps[0], len(maps))


def sums(maps: Sequence[Tensor], levels: Tensor, distance: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    """(number_of_rows, 2) float64."""
    pairs = level_pairs(len(maps))
    nothing = levels.new_zeros(())
    found: list[Tensor] = []
    for place in _pieces(maps):
        piece = _Piece(maps, levels, distance, mask, terms.near, place)
        for i, k in pairs if terms.rising else ():
            x = piece.fall(i, k, piece.gap(i, k)).relu_()
            found += (x.sum(), x.sign_().sum())
        if not terms.rising:
            found += [nothing] * (2 * len(pairs))
        if terms.far:
            found += (torch.stack([(u * piece.far).sum() for u in piece.u]).sum(), piece.far.sum())
        else:
            found += [nothing] * 2
    return torch.stack(found).double().view(-1, len(pairs) + 1, 2).sum(0)


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
    first = 0 if clean else 1
    pairs = level_pairs(len(maps)) if terms.rising else []
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps[first:]]
    c = coefficients.to(levels.dtype)
    for place in _pieces(maps):
        piece = _Piece(maps, levels, distance, mask, terms.near, place)
        far = piece.far * c[-1] if terms.far else torch.zeros_like(piece.u[0])
        du = [far] * len(maps)
        for slope, (i, k) in zip(c, pairs, strict=False):
            gap = piece.gap(i, k)
            step = piece.fall(i, k, gap).gt_(0).mul_(slope * gap)
            du[i] = du[i] - step
            if k > 0 or (clean and clean_rises):
                du[k] = du[k] + step
        for result, value in zip(out, du[first:], strict=True):
            result[place] = value
    return out
