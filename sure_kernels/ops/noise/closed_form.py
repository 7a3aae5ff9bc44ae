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


# Integers as wide: a number whose bits are masked is itself or 0, in a tenth of the time that torch.where takes.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Piece:
    """Some voxels of some images: the maps [n, b], and 1 where a voxel is near or far.

    On a CPU torch compares into floats several times faster than into booleans.
    """

    def __init__(
        self,
        maps: Sequence[Tensor],
        distance: Tensor,
        mask: Tensor | None,
        near: float,
        place: Place,
        rooms: Sequence[Tensor],
    ) -> None:
        d = distance[place]
        near_room, far_room, self.room = rooms
        self.u = [x[place].to(d.dtype) for x in maps]
        self.near, self.far = torch.le(d, near, out=near_room), torch.gt(d, near, out=far_room)
        if mask is not None:
            # Replaced, not multiplied by 0: NaN in voxels that do not count must not reach the sums.
            bits = mask[place].to(_BITS[d.dtype]).neg_()
            *self.u, self.near, self.far = (
                x.view(bits.dtype).bitwise_and(bits).view(d.dtype) for x in (*self.u, self.near, self.far)
            )

    def fall(self, pair: tuple[int, int], gap: Tensor) -> Tensor:
        """x of a pair of levels over near voxels, [n, b], in the room that there is for one map."""
        i, k = pair
        return torch.sub(self.u[k], self.u[i], out=self.room).mul_(gap).mul_(self.near)

    def far_total(self) -> Tensor:
        """u_0 + ... + u_L over far voxels, [n, b], in the same room."""
        total = torch.add(self.u[0], self.u[1], out=self.room)
        for u in self.u[2:]:
            total.add_(u)
        return total.mul_(self.far)


def _gaps(levels: Tensor) -> list[Tensor]:
    """m_i - m_k of each pair of levels, [N, 1]."""
    m = levels.unsqueeze(2).unbind()
    return [m[i] - m[k] if k else m[i] for i, k in level_pairs(len(m))]


def _pieces(maps: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Place, Sequence[Tensor]]]:
    """Places, and for each of them memory for three maps: the same memory, which the system gives only once."""
    memory: Tensor | None = None
    for place in blocks(maps[0], len(maps)):
        n, b = (s.stop - s.start for s in place)
        if memory is None:  # the first piece is the largest
            memory = maps[0].new_empty((3, n * b), dtype=dtype)
        yield place, memory[:, : n * b].view(3, n, b).unbind()


def sums(maps: Sequence[Tensor], levels: Tensor, distance: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    """(number_of_rows, 2) float64."""
    pairs, gaps = level_pairs(len(maps)), _gaps(levels)
    nothing = levels.new_zeros(2).unbind()
    found: list[Tensor] = []
    for place, rooms in _pieces(maps, distance.dtype):
        piece = _Piece(maps, distance, mask, terms.near, place, rooms)
        # Not torch.dot: it starts a team of threads for every piece, however small.
        for pair, gap in zip(pairs, gaps, strict=True):
            if terms.rising:
                x = piece.fall(pair, gap[place[0]]).relu_()
                found += (x.sum(), x.sign_().sum())
            else:
                found += nothing
        found += (piece.far_total().sum(), piece.far.sum()) if terms.far else nothing
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
    pairs, gaps = (level_pairs(len(maps)), _gaps(levels)) if terms.rising else ([], [])
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps[first:]]
    c = coefficients.to(levels.dtype)
    c_far = c[-1] if terms.far else c.new_zeros(())
    for place, rooms in _pieces(maps, distance.dtype):
        piece = _Piece(maps, distance, mask, terms.near, place, rooms)
        # Made where they belong, unless that is a lower precision.
        places = [x[place] if x.dtype == levels.dtype else torch.empty_like(piece.far) for x in out]
        du = [torch.mul(piece.far, c_far, out=to) for to in places]
        for slope, pair, gap in zip(c, pairs, gaps, strict=False):
            change = slope * gap[place[0]]
            step = piece.fall(pair, gap[place[0]]).gt_(0)
            i, k = pair
            du[i - first].addcmul_(step, change, value=-1)
            if k > 0 or (clean and clean_rises):
                du[k - first].addcmul_(step, change)
        for result, value in zip(out, du, strict=True):
            if result.dtype != value.dtype:
                result[place] = value
    return out
