"""How squared distances are held while they are computed: small integers where the spacing allows it.

d^2 = sum_axis (k_axis s_axis)^2 with whole k. Where all s_axis^2 are whole multiples of one unit (isotropic spacing, or
ratios such as 1 : 1 : 2.5), d^2 is a whole number of units, and up to a moderate distance that number fits a byte or
two. Otherwise it is a float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

# A distance counts as at most T up to T (1 + TOLERANCE), so that one equal to T does in whatever arithmetic.
TOLERANCE = 2e-6
# Spacings that are whole multiples but for the rounding of float32 headers are taken to be.
_RATIO_ERROR = 1e-7
_LARGEST_RATIO = 1000
# Integers serve windowed passes: farther along an axis than this, other ways are faster.
_LONGEST_WINDOW = 64


def reach(distance: float) -> float:
    """`distance`, with the tolerance by which it may be exceeded."""
    return distance * (1 + TOLERANCE)


def _square(x: float) -> float:
    return x * x  # x**2 raises where this is infinite


@dataclass(frozen=True)
class Codes:
    """Squared distances as numbers `code`, d^2 = code * unit.

    Attributes:
        dtype: uint8, int16 (twice the largest code fits) or float32.
        unit: of squared distance.
        costs: squared spacing of each axis, in units.
        steps: voxels along each axis within reach.
        limit: largest code that counts; what is beyond is infinitely far.
        none: the code of no boundary in reach.
    """

    dtype: torch.dtype
    unit: float
    costs: tuple[float, ...]
    steps: tuple[int, ...]
    limit: float
    none: float

    def of(self, distance: float) -> float:
        """The largest code at most `distance` away, not beyond `limit`."""
        code = min(_square(reach(distance)) / self.unit, self.limit)
        return code if self.dtype == torch.float32 else math.floor(code)


def _whole_multiples(squares: tuple[float, ...], largest_ratio: int) -> tuple[float, tuple[int, ...]] | None:
    """(unit, multiples) of numbers that are whole multiples of smallest / q for some q up to `largest_ratio`."""
    smallest = min(squares)
    for q in range(1, min(largest_ratio, _LARGEST_RATIO) + 1):
        multiples = tuple(round(q * square / smallest) for square in squares)
        if all(
            abs(m * smallest - q * square) <= _RATIO_ERROR * q * square
            for m, square in zip(multiples, squares, strict=True)
        ):
            return smallest / q, multiples
    return None


@functools.lru_cache(maxsize=256)
def choose_codes(spatial: tuple[int, ...], spacing: tuple[float, ...], max_distance: float | None) -> Codes:
    """Codes for volumes of this shape, with distances up to `max_distance` or all of them."""
    squares = tuple(step * step for step in spacing)
    diagonal = sum((n - 1) ** 2 * square for n, square in zip(spatial, squares, strict=True))
    farthest = diagonal * (1 + TOLERANCE)
    if max_distance is not None:
        farthest = min(farthest, _square(reach(max_distance)))
    steps = tuple(min(n - 1, math.isqrt(int(farthest / square))) for n, square in zip(spatial, squares, strict=True))
    if max(steps) == 0:
        return Codes(torch.uint8, 1.0, (0,) * len(spatial), steps, 0, 1)
    if max(steps) <= _LONGEST_WINDOW:
        for dtype in (torch.uint8, torch.int16):
            largest = torch.iinfo(dtype).max // 2
            found = _whole_multiples(squares, int(largest * min(squares) / farthest))
            if found is not None and int(farthest / found[0]) < largest:
                unit, costs = found
                limit = int(farthest / unit)
                return Codes(dtype, unit, costs, steps, limit, limit + 1)
    unit = min(squares)
    return Codes(torch.float32, unit, tuple(square / unit for square in squares), steps, farthest / unit, math.inf)
