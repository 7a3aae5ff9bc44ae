"""Autograd Functions of the soft losses, the losses made of them, and the pairs they are taken over.

Losses have the names and arguments of the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.distributed import all_reduced, global_sum, world_size
from sure_kernels.kernel_lib.random import permutation
from sure_kernels.ops.soft import closed_form, reference
from sure_kernels.ops.soft.reference import PairTerms, SoftThresholds


class WindowMeanFunction(torch.autograd.Function):
    """Mean over a window of a map (N, 1, *spatial); keeps what counts, which is the caller's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, counted: Tensor | None, official: bool) -> Tensor:
        ctx.save_for_backward(counted)
        ctx.options = size, official
        return closed_form.window_mean(x, size, counted, official)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (counted,) = ctx.saved_tensors
        size, official = ctx.options
        return closed_form.window_mean_adjoint(grad, size, counted, official), None, None, None


class PairLossFunction(torch.autograd.Function):
    """`reference.pair_loss` of a map; keeps it, the pairs, slopes and ratios, all shared between maps.

    Returns the loss and, without gradient, the shares (S,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        pairs: Tensor,
        slopes: Tensor,
        ratio: Tensor,
        weight: Tensor,
        factors: Sequence[float],
        process_group: Any | None,
    ) -> tuple[Tensor, Tensor]:
        shares = closed_form.pair_sums(u.flatten(), pairs, slopes, ratio, factors)
        joined = all_reduced(torch.cat((shares, weight.sum(dtype=torch.float64).view(1))), process_group)
        number = torch.where(joined[-1] > 0, joined[-1], 1.0)
        shares = (joined[:-1] / number).to(u.dtype)
        loss = torch.stack([share * factor for share, factor in zip(shares, factors, strict=True)]).sum()
        ctx.save_for_backward(u, pairs, slopes, ratio, world_size(process_group) / number)
        ctx.factors = factors
        ctx.mark_non_differentiable(shares)
        return loss, shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        u, pairs, slopes, ratio, scale = ctx.saved_tensors
        du = closed_form.pair_gradient(u.flatten(), pairs, slopes, ratio, ctx.factors, grad * scale)
        return du.view_as(u), *(None,) * 6


def pair_loss(
    u: Tensor, pairs: Tensor, terms: PairTerms, factors: Sequence[float], process_group: Any | None = None
) -> tuple[Tensor, Tensor]:
    return PairLossFunction.apply(u, pairs, *terms, tuple(factors), process_group)


def soft_gradient_loss(
    u: Tensor,
    g: Tensor,
    distance: Tensor,
    pairs: Tensor,
    thresholds: SoftThresholds,
    *,
    process_group: Any | None,
    **options: Any,
) -> Tensor:
    terms = reference.gradient_pairs(g.to(u.dtype), distance, pairs, thresholds, **options)
    u = WindowMeanFunction.apply(u, thresholds.normal_kernel, options["counted"], options["official"])
    return pair_loss(u, pairs, terms, (1.0,), process_group)[0]


def soft_noise_loss(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    thresholds: SoftThresholds,
    *,
    counted: Tensor | None,
    official: bool,
    process_group: Any | None,
) -> Tensor:
    w = reference.noise_weight(distance, thresholds, counted, official=official)
    number = all_reduced(w.sum(dtype=torch.float64), process_group)
    total = torch.zeros_like(number)
    for n in range(1, len(maps)):
        # Windows are linear: the mean of the difference is the difference of the means.
        rise = WindowMeanFunction.apply(maps[n] - maps[n - 1].detach(), thresholds.patch_kernel, counted, official)
        gap = (levels[n] - levels[n - 1]).view(-1, *(1,) * (w.ndim - 1))
        total = total + (w * torch.relu(-gap * rise)).sum(dtype=torch.float64)
    return (global_sum(total, process_group) / torch.where(number > 0, number, 1.0)).to(w.dtype)


def draw_pairs(
    like: Tensor,
    wanted: Tensor | None,
    num_pairs: int | None,
    generator: torch.Generator | None,
    *,
    across: bool,
) -> Tensor:
    """(P, 2) disjoint random pairs of positions in the flattened maps `like` (N, 1, *spatial).

    Within each image, at most `num_pairs` of them, of voxels that are `wanted` as long as there are any; one draw
    serves all images. Or `across` the images, at most `num_pairs` in all.
    """
    if across:
        count = like.numel() // 2 if num_pairs is None else min(num_pairs, like.numel() // 2)
        return permutation(like.numel(), like.device, generator)[: 2 * count].view(-1, 2)
    n, v = len(like), like[0].numel()
    order = permutation(v, like.device, generator).expand(n, v)
    if wanted is not None:
        # A stable partition: the wanted voxels of each image in random order, then the others.
        first = wanted.flatten(1).gather(1, order)
        place = torch.where(first, first.cumsum(1) - 1, first.sum(1, keepdim=True) + (~first).cumsum(1) - 1)
        order = torch.empty_like(order).scatter_(1, place, order)
    count = v // 2 if num_pairs is None else min(num_pairs, v // 2)
    start = v * torch.arange(n, device=like.device).unsqueeze(1)
    return (order[:, : 2 * count] + start).reshape(-1, 2)
