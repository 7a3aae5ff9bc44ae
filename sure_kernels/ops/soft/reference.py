"""PriUS's soft losses straight from their formulas (arXiv 2605.10984), differentiable by autograd.

With s(x) the sigmoid, distance d, gradient magnitude g, uncertainty u_n at noise level m_n, and pairs (i, j) of voxels,
of which those of one class (`same`) count:

    gradient   u~ = mean, g~ = max over a window across the boundary; w = s(10 alpha (d_g - max(d_i, d_j)))
               sum w relu((u~_i - u~_j)(g~_i - g~_j)) / sum w
    noise      u^ = mean over a window; w = s(alpha (d_n - d))
               sum over levels n of [sum w relu(-(m_n - m_(n-1))(u^_n - stopgrad u^_(n-1))) / sum w]
    distance   t = s(alpha (d_i - d_f)) s(alpha (d_j - d_f)), w = s(alpha (|d_i - d_j| - d_eps))
               a = coef_d w (1 - t)(d_i - d_j) + coef_far t
               sum relu(a (u_i - (1 - 2 t) u_j)) / sum (w (1 - t) + t)

The published program pads its windows with zeros that it counts, and pairs voxels across images: `official`. Otherwise
windows average what is in the image and counts, weights of at most 1e-6 are 0, so that a batch without a boundary is
not all about voxels far from it, and voxels at infinite distance take part in the far part of `distance` alone.

Maps are (N, 1, *spatial), pairs (P, 2) of positions in a map flattened with its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sure_kernels.kernel_lib.distributed import all_reduced, global_sum

NEGLIGIBLE = 1e-6
# How much sharper the gradient's indicator is than the others'.
GRADIENT_SHARPNESS = 10.0


class SoftThresholds(NamedTuple):
    """Distances and slopes of PriUS's soft losses; the defaults are those of its ACDC configuration.

    The ISIC configuration has d_g=5, d_f=24, d_n=8, d_eps=0 and the rest alike. Both were made for the published
    distance, which is 0 in the whole background; with `boundary_distance` they mean what they say.

    Attributes:
        d_g: up to this distance (in its unit) a voxel is on the boundary.
        d_f: from this distance on it is far.
        d_n: up to this distance uncertainty has to rise with the noise.
        d_eps: two voxels are ranked by distance if theirs differ by more.
        alpha: slope of the sigmoids, per unit of distance.
        coef_d: weight of the ranking by distance.
        coef_far: weight of uncertainty far from the boundary.
        normal_kernel: width of the window across the boundary, odd.
        patch_kernel: width of the window for the response to noise, odd.
    """

    d_g: float = 0.5
    d_f: float = 8.5
    d_n: float = 7.5
    d_eps: float = 3.0
    alpha: float = 10.0
    coef_d: float = 1.0
    coef_far: float = 100.0
    normal_kernel: int = 3
    patch_kernel: int = 5


class PairTerms(NamedTuple):
    """What a pair contributes: relu(sum of factor * slope * (u_i - ratio u_j)), over the sum of weights.

    `slopes` is (S, P), one row for each factor; `ratio` (P,), `weight` (P,).
    """

    slopes: Tensor
    ratio: Tensor
    weight: Tensor


def soft_indicator(x: Tensor, alpha: float) -> Tensor:
    """1 where x > 0, 0 where x < 0, softly: the sigmoid of alpha x."""
    return torch.sigmoid(alpha * x)


def window_mean(x: Tensor, size: int, counted: Tensor | None = None, official: bool = False) -> Tensor:
    """Mean of the counted voxels in a window of width `size`; `official` divides by its volume at borders too."""
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    ones = torch.ones_like(x) if counted is None else counted.to(x.dtype)
    x = x if counted is None else torch.where(counted, x, 0.0)
    mean, share = (pool(_padded(y, size, 0.0), size, stride=1) for y in (x, ones))
    return mean if official else mean / torch.where(share > 0, share, 1.0)


def window_max(x: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """Maximum of the counted voxels in a window of width `size`."""
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    x = x if counted is None else torch.where(counted, x, -torch.inf)
    return pool(_padded(x, size, -torch.inf), size, stride=1)


def _padded(x: Tensor, size: int, value: float) -> Tensor:
    """`x` with half a window of `value` around it; pooling's own padding refuses images smaller than the window."""
    return F.pad(x, [size // 2] * (2 * (x.ndim - 2)), value=value)


def _negligible(weight: Tensor, official: bool) -> Tensor:
    return weight if official else torch.where(weight > NEGLIGIBLE, weight, 0.0)


def _same(pairs: Tensor, groups: Tensor | None, counted: Tensor | None) -> Tensor:
    """Whether both voxels of a pair count and are of one class, (P,)."""
    i, j = pairs.unbind(1)
    same = torch.ones_like(i, dtype=torch.bool)
    if groups is not None:
        same = _at(groups, i) == _at(groups, j)
    if counted is not None:
        same = same & _at(counted, i) & _at(counted, j)
    return same


def _at(x: Tensor, index: Tensor) -> Tensor:
    """The entries of a flattened map."""
    return x.flatten().index_select(0, index)


def boundary_weight(distance: Tensor, thresholds: SoftThresholds) -> Tensor:
    """How surely a voxel, or the farther one of a pair, is on the boundary."""
    return soft_indicator(thresholds.d_g - distance, GRADIENT_SHARPNESS * thresholds.alpha)


def gradient_pairs(
    g: Tensor,
    distance: Tensor,
    pairs: Tensor,
    thresholds: SoftThresholds,
    *,
    groups: Tensor | None = None,
    counted: Tensor | None = None,
    relation: str = "decreasing",
    official: bool = False,
) -> PairTerms:
    """The pairs of the gradient loss."""
    i, j = pairs.unbind(1)
    g = window_max(g, thresholds.normal_kernel, counted)
    w = boundary_weight(torch.maximum(_at(distance, i), _at(distance, j)), thresholds)
    w = torch.where(_same(pairs, groups, counted), _negligible(w, official), 0.0)
    sign = 1.0 if relation == "decreasing" else -1.0
    slope = torch.where(w > 0, sign * w * (_at(g, i) - _at(g, j)), 0.0)
    return PairTerms(slope.unsqueeze(0), torch.ones_like(w), w)


def distance_pairs(
    distance: Tensor,
    pairs: Tensor,
    thresholds: SoftThresholds,
    *,
    groups: Tensor | None = None,
    counted: Tensor | None = None,
    official: bool = False,
) -> PairTerms:
    """The pairs of the distance loss; the slopes are of the ranking and of the far part."""
    i, j = pairs.unbind(1)
    d = distance.flatten()
    gap = d[i] - d[j]
    t = soft_indicator(d[i] - thresholds.d_f, thresholds.alpha) * soft_indicator(
        d[j] - thresholds.d_f, thresholds.alpha
    )
    ranked = soft_indicator(gap.abs() - thresholds.d_eps, thresholds.alpha) * (1 - t)
    # Infinite or undefined: such a pair has no order that could be measured.
    ranked, gap = (torch.where(torch.isfinite(gap), x, 0.0) for x in (ranked, gap))
    weight = torch.where(_same(pairs, groups, counted), _negligible(ranked + t, official), 0.0)
    on = weight > 0
    slopes = torch.stack((thresholds.coef_d * ranked * gap, thresholds.coef_far * t))
    return PairTerms(torch.where(on, slopes, 0.0), 1 - 2 * t, weight)


def pair_loss(
    u: Tensor, pairs: Tensor, terms: PairTerms, factors: Sequence[float], process_group: object | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of uncertainty `u` over `pairs`, and (S,) the share that each of the slopes has in it, per factor."""
    i, j = pairs.unbind(1)
    step = _at(u, i) - terms.ratio * _at(u, j)
    factor = torch.tensor(factors, dtype=u.dtype, device=u.device)
    slope = factor @ terms.slopes
    # A NaN counts, where the pair does.
    active = (slope != 0) & ~(slope * step.detach() <= 0)
    shares = torch.where(active, terms.slopes * step, 0.0).sum(1)
    number = all_reduced(terms.weight.sum(), process_group)
    shares = global_sum(shares, process_group) / torch.where(number > 0, number, 1.0)
    return (factor * shares).sum(), shares.detach()


def soft_gradient_loss(
    u: Tensor,
    g: Tensor,
    distance: Tensor,
    pairs: Tensor,
    thresholds: SoftThresholds,
    *,
    groups: Tensor | None = None,
    counted: Tensor | None = None,
    relation: str = "decreasing",
    official: bool = False,
    process_group: object | None = None,
) -> Tensor:
    """The gradient loss of maps u, g, distance, groups and counted (N, 1, *spatial)."""
    options: dict[str, Any] = {"groups": groups, "counted": counted, "official": official}
    terms = gradient_pairs(g.to(u.dtype), distance.to(u.dtype), pairs, thresholds, relation=relation, **options)
    u = window_mean(u, thresholds.normal_kernel, counted, official)
    return pair_loss(u, pairs, terms, (1.0,), process_group)[0]


def soft_distance_loss(
    u: Tensor,
    distance: Tensor,
    pairs: Tensor,
    thresholds: SoftThresholds,
    *,
    groups: Tensor | None = None,
    counted: Tensor | None = None,
    official: bool = False,
    process_group: object | None = None,
) -> Tensor:
    """The distance loss of maps u, distance, groups and counted (N, 1, *spatial)."""
    u = u if counted is None else torch.where(counted, u, 0.0)
    terms = distance_pairs(distance.to(u.dtype), pairs, thresholds, groups=groups, counted=counted, official=official)
    return pair_loss(u, pairs, terms, (1.0, 1.0), process_group)[0]


def noise_weight(
    distance: Tensor, thresholds: SoftThresholds, counted: Tensor | None = None, *, official: bool = False
) -> Tensor:
    """w of the noise loss, like `distance`."""
    w = _negligible(soft_indicator(thresholds.d_n - distance, thresholds.alpha), official)
    return w if counted is None else torch.where(counted, w, 0.0)


def soft_noise_loss(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    thresholds: SoftThresholds,
    *,
    counted: Tensor | None = None,
    official: bool = False,
    process_group: object | None = None,
) -> Tensor:
    """The noise loss of maps u_0, u_1, ... (N, 1, *spatial) at `levels` (number of maps, N)."""
    w = noise_weight(distance.to(maps[0].dtype), thresholds, counted, official=official)
    number = all_reduced(w.sum(), process_group)
    means = [window_mean(u, thresholds.patch_kernel, counted, official) for u in maps]
    total = torch.zeros_like(number)
    for n in range(1, len(maps)):
        gap = (levels[n] - levels[n - 1]).view(-1, *(1,) * (w.ndim - 1))
        total = total + (w * torch.relu(-gap * (means[n] - means[n - 1].detach()))).sum()
    return global_sum(total, process_group) / torch.where(number > 0, number, 1.0)


def prius_distance_loss(u: Tensor, distance: Tensor, samples: Tensor) -> Tensor:
    """What the published PriUS-3D program computes in place of a ranking by distance; for comparison only.

    Per row of `samples` (R, k), positions in the flattened maps with -1 for none: with q = (d_j - d_i)(u_j - u_i) over
    i < j and m = #{q > 0}, (sum over q > 0 of e^q + k^2 - m) / (m + 1e-6); their sum over the number of pairs of the
    rows with m > 0. It falls as violations rise.
    """
    u, d = u.flatten(), distance.flatten().to(u.dtype)
    total, pairs = 0.0 * u.sum(), 0
    for row in samples:
        chosen = row[row >= 0].long()
        k = len(chosen)
        q = torch.triu((d[chosen] - d[chosen][:, None]) * (u[chosen] - u[chosen][:, None]), 1)
        m = int((q > 0).sum())
        if m:
            total = total + (torch.exp(q[q > 0]).sum() + k * k - m) / (m + 1e-6)
            pairs += k * (k - 1) // 2
    return total / max(pairs, 1)
