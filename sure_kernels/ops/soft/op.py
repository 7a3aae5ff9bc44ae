"""Autograd Functions of the soft losses, and the pairs they are taken over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.kernel_lib.random import uniform
from sure_kernels.ops.soft import closed_form, reference
from sure_kernels.ops.soft.reference import NEGLIGIBLE, PairTerms, SoftThresholds


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
