"""Distance to label boundaries, exact, axis by axis, on the tensor's device.

The squared distance separates: d2(x) = min over y of (x_1 - y_1)^2 s_1^2 + ... is one min-plus pass along each axis,
d2[i] <- min over j of d2[j] + (i - j)^2 s^2, on codes of a byte or two where they fit (`codes.py`). A pass that looks
only a few voxels far goes shift by shift. Where it has to look farther the first one sweeps to and fro, counting steps,
and the others take blocks of sites in the order of how near they might be, up to the first that cannot be nearer than
what was found: a few blocks, however large the volume.

The volume is swept in two stages of cache-sized pieces: boundary voxels and the inner passes in slabs across the first
spatial axis, then the pass along it and what is made of the result. Only the codes are held between them. Comparisons
with numbers, `where` and `masked_fill` are kept out of them: on bytes torch is 20 to 100 times slower at those than at
minima and sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sure_kernels.kernel_lib.labels import BOUNDARY, FAR, NEAR, comparable
from sure_kernels.ops.boundary_distance.codes import Codes, choose_codes

# Voxels of a piece. Measured on two CPU cores with bytes; on a GPU launches cost more than memory does.
_CPU_PIECE, _GPU_PIECE = 1 << 19, 1 << 26
# A windowed pass over floats costs about 0.5 ns a voxel and step, a search 20 ns a voxel however far it looks.
_LONGEST_FLOAT_WINDOW = 32
# Rows of a block of the search, and lines that are searched together: alike, so that one bound serves them.
_BLOCK, _LINES = 16, 2048


def boundary_voxels(target: Tensor, ignore_index: int) -> Tensor:
    """As the reference, by separable minima and maxima of bytes: labels differ where one of their bytes does."""
    labels, ignored_label = comparable(target, ignore_index)
    low, high = (int(v) for v in torch.aminmax(labels))
    ignored = labels == ignored_label if ignored_label is not None and low <= ignored_label <= high else None
    if low < 0 and target.dtype.is_signed:
        labels, low = labels.clamp(min=0), 0
    count = labels.element_size() if low < 0 else max(1, (high.bit_length() + 7) // 8)
    found = _bytes_differ(labels.to(torch.uint8), ignored)
    for place in range(1, count):
        found |= _bytes_differ((labels >> 8 * place).to(torch.uint8), ignored)
    return found if ignored is None else found & ~ignored


def _bytes_differ(labels: Tensor, ignored: Tensor | None) -> Tensor:
    """Whether the 3^ndim neighbourhood of each voxel, without `ignored` ones, holds two values."""
    low = high = labels
    if ignored is not None:
        hidden = ignored.to(torch.uint8) * 255
        low, high = labels | hidden, labels & ~hidden
    for axis in range(1, labels.ndim):
        low = _extreme(low, axis, torch.minimum)
        high = _extreme(high, axis, torch.maximum)
    return high > low


def _extreme(x: Tensor, axis: int, pick: Callable[..., Tensor]) -> Tensor:
    """min or max over three neighbours along `axis`, cut at the border."""
    n = x.shape[axis]
    out = x.clone()
    for here, there in ((0, 1), (1, 0)):
        near = out.narrow(axis, here, n - 1)
        pick(near, x.narrow(axis, there, n - 1), out=near)
    return out


def _windowed(x: Tensor, axis: int, cost: float, steps: int) -> Tensor:
    """One min-plus pass, shift by shift."""
    n = x.shape[axis]
    out, shifted = x.clone(), torch.empty_like(x)
    for shift in range(1, steps + 1):
        # Now and then: can anything still shrink?
        if shift % 8 == 0 and cost * shift**2 >= float(out.max()):
            break
        torch.add(x, cost * shift**2, out=shifted)
        for here, there in ((0, shift), (shift, 0)):
            near = out.narrow(axis, here, n - shift)
            torch.minimum(near, shifted.narrow(axis, there, n - shift), out=near)
    return out


def _swept(x: Tensor, cost: float) -> Tensor:
    """The first pass along the first axis of float (length, lines): 0 where boundary, +inf elsewhere."""
    steps = x.clone()
    rows = steps.unbind()
    for order in (rows, rows[::-1]):
        for before, row in itertools.pairwise(order):
            torch.minimum(row, before + 1, out=row)
    return steps.square_().mul_(cost)


def _searched(x: Tensor, cost: float, limit: float) -> Tensor:
    """One min-plus pass along the first axis of float (length, lines), +inf being no site, block by block."""
    out = torch.full_like(x, math.inf)
    # What a line without sites may be left at.
    ceiling = torch.where(torch.isfinite(x.amin(0)), math.inf, 0.0)
    blocks = x.split(_BLOCK)
    least = [float(block.min()) for block in blocks]
    offsets = torch.arange(len(x), dtype=x.dtype, device=x.device)
    for here, best in enumerate(out.split(_BLOCK)):
        # The nearest rows of two blocks are this far apart.
        bounds = [
            least[there] + cost * (max(abs(here - there) - 1, 0) * _BLOCK + (here != there)) ** 2
            for there in range(len(blocks))
        ]
        rows = offsets[here * _BLOCK :][: len(best), None]
        for there in sorted(range(len(blocks)), key=bounds.__getitem__):
            if bounds[there] > limit or bounds[there] >= float(torch.minimum(best, ceiling).max()):
                break
            sites = blocks[there]
            steps = rows - offsets[there * _BLOCK :][: len(sites)]
            torch.minimum(best, (sites + (cost * steps.square()).unsqueeze(-1)).amin(1), out=best)
    return out


def _min_plus(x: Tensor, axis: int, codes: Codes, *, first: bool = False) -> Tensor:
    """The pass along `axis`, in whichever way is fastest; `first` of all."""
    cost, steps = codes.costs[axis - 1], codes.steps[axis - 1]
    if not x.is_floating_point() or steps <= _LONGEST_FLOAT_WINDOW:
        return _windowed(x, axis, cost, steps)
    moved = x.movedim(axis, 0)
    lines = moved.reshape(moved.shape[0], -1)
    if first:
        done = _swept(lines, cost)
    else:
        done = torch.cat([_searched(some, cost, codes.limit) for some in lines.split(_LINES, 1)], 1)
    return done.view(moved.shape).movedim(0, axis)


def _pieces(x: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """Slices (of images, along `axis`) that cover `x` in pieces."""
    budget = _CPU_PIECE if x.device.type == "cpu" else _GPU_PIECE
    images, length, voxels = x.shape[0], x.shape[axis], x[0].numel()
    if voxels <= budget:
        step = budget // voxels
        yield from ((slice(i, i + step), slice(0, length)) for i in range(0, images, step))
        return
    step = max(1, budget * length // voxels)
    for image in range(images):
        yield from ((slice(image, image + 1), slice(i, min(i + step, length))) for i in range(0, length, step))


def _boundary_codes(target: Tensor, codes: Codes, ignore_index: int) -> Tensor:
    """Codes after the passes along all spatial axes but the first."""
    out = torch.empty(target.shape, dtype=codes.dtype, device=target.device)
    length = target.shape[1]
    for images, rows in _pieces(target, 1):
        first = max(rows.start - 1, 0)
        found = boundary_voxels(target[images, first : min(rows.stop + 1, length)], ignore_index)
        found = found.narrow(1, rows.start - first, rows.stop - rows.start)
        if codes.dtype.is_floating_point:
            part = found.to(codes.dtype).reciprocal_().sub_(1)  # 0 or +inf
        else:
            part = (~found).to(codes.dtype).mul_(int(codes.none))
        for axis in range(2, target.ndim):
            part = _min_plus(part, axis, codes, first=axis == 2)
        out[images, rows] = part
    return out


def _transformed(
    target: Tensor, codes: Codes, ignore_index: int, dtype: torch.dtype, finish: Callable[[Tensor], Tensor]
) -> Tensor:
    """finish(codes of the whole transform), (N, 1, *spatial) of `dtype`."""
    across = _boundary_codes(target, codes, ignore_index)
    n, *spatial = target.shape
    out = torch.empty((n, 1, *spatial), dtype=dtype, device=target.device)
    for images, columns in _pieces(across, 2):
        part = across[images, :, columns].contiguous()
        out[images, 0, :, columns] = finish(_min_plus(part, 1, codes))
    return out


def _finish(codes: Codes, of_codes: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """`of_codes`, by table for integers: it is given each of them once."""
    if codes.dtype.is_floating_point:
        return of_codes
    table = of_codes(torch.arange(int(codes.none) + 1, dtype=torch.float64)).to(device)
    return lambda x: table.index_select(0, x.flatten().int()).view(x.shape)


def boundary_distance(
    target: Tensor, *, max_distance: float | None, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """Float32 (N, 1, *spatial) on the target's device; +inf without a boundary or beyond `max_distance`."""
    codes = choose_codes(tuple(target.shape[1:]), spacing, max_distance)

    def distances(x: Tensor) -> Tensor:
        # What masked_fill_ would do, but vectorised: -x, or -inf where that is below -limit.
        farthest = math.nextafter(-codes.limit, -math.inf)
        roots = F.threshold(x.neg_(), farthest, -math.inf, inplace=True).neg_().sqrt_()
        return roots.mul_(math.sqrt(codes.unit)).float()

    return _transformed(target, codes, ignore_index, torch.float32, _finish(codes, distances, target.device))


def band_of(values: Tensor, boundary: float, near: float, far: float) -> Tensor:
    """uint8 band for boundary <= near <= far: of distances, or of codes with thresholds alike."""
    band = (values > far).to(torch.uint8).mul_(FAR)
    return band.add_(values <= near, alpha=NEAR).add_(values <= boundary, alpha=BOUNDARY - NEAR)


def boundary_band(
    target: Tensor, *, boundary: float, near: float, far: float, spacing: tuple[float, ...], ignore_index: int
) -> Tensor:
    """uint8 (N, 1, *spatial), straight from the codes."""
    codes = choose_codes(tuple(target.shape[1:]), spacing, far)
    thresholds = (codes.of(boundary), codes.of(near), codes.limit)
    finish = _finish(codes, lambda x: band_of(x, *thresholds), target.device)
    return _transformed(target, codes, ignore_index, torch.uint8, finish)
