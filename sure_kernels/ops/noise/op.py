"""Custom ops, their fakes and the autograd Function of `noise_uncertainty_loss`'s voxelwise terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.ops.noise import closed_form
from sure_kernels.ops.noise.closed_form import Terms, number_of_rows


@custom_op("sure_kernels::noise_sums")
def noise_sums(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    mask: Tensor | None,
    near: float,
    rising: bool,
    far: bool,
    backend: str,
) -> Tensor:
    terms = Terms(near, rising, far)
    if backend == "triton":
        from sure_kernels.ops.noise import kernel

        return kernel.sums(maps, levels, distance, mask, terms)
    return closed_form.sums(maps, levels, distance, mask, terms)


@noise_sums.register_fake
def _(maps, levels, distance, *options):
    return distance.new_empty((number_of_rows(len(maps)), 2), dtype=torch.float64)


@custom_op("sure_kernels::noise_gradient")
def noise_gradient(
    maps: Sequence[Tensor],
    levels: Tensor,
    distance: Tensor,
    mask: Tensor | None,
    coefficients: Tensor,
    upstream: Tensor,
    near: float,
    rising: bool,
    far: bool,
    clean: bool,
    clean_rises: bool,
    backend: str,
) -> list[Tensor]:
    terms = Terms(near, rising, far)
    if backend == "triton":
        from sure_kernels.ops.noise import kernel

        return kernel.gradient(maps, levels, distance, mask, coefficients, upstream, terms, clean, clean_rises)
    scaled = coefficients * upstream
    return closed_form.gradient(maps, levels, distance, mask, scaled, terms, clean, clean_rises)


@noise_gradient.register_fake
def _(maps, levels, distance, mask, coefficients, upstream, near, rising, far, clean, clean_rises, backend):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in maps[0 if clean else 1 :]]


class NoiseUncertaintyFunction(torch.autograd.Function):
    """rising_weight * L_mu + far_weight * L_far of maps (N, V); keeps the maps and what is handed in beside them.

    With `index` (N, P), L_mu is over these voxels (those where `listed`) instead of all, and the maps' values there
    are returned as well, (L + 1, N, P), so that what else is made of them adds to the same gradient.
    Returns the loss, (L_mu, L_far) without gradient, and these values (empty without an index).
    """

    @staticmethod
    def forward(
        ctx: Any,
        levels: Tensor,
        distance: Tensor,
        mask: Tensor | None,
        index: Tensor | None,
        listed: Tensor | None,
        near: float,
        weights: tuple[float, float],
        official: bool,
        process_group: Any | None,
        backend: str,
        *maps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = working_dtype(maps[0].dtype)
        points = None
        if index is None:
            values = maps[0].new_empty(0)
            totals = noise_sums(maps, levels, distance, mask, near, True, True, backend)
        else:
            values = torch.stack([x.gather(1, index) for x in maps]).to(dtype)
            points = (distance.gather(1, index), listed)
            totals = noise_sums(maps, levels, distance, mask, near, False, True, backend)
            # A handful of points: whatever serves the maps, the closed form serves these.
            totals = totals + noise_sums(list(values), levels, *points, near, True, False, "eager")
        result = closed_form.finalise(totals, *weights, process_group)
        coefficients = result.coefficients
        ctx.save_for_backward(levels, distance, mask, index, listed, coefficients, values, *maps)
        ctx.options = near, official, backend
        terms = result.terms.to(dtype)
        ctx.mark_non_differentiable(terms, *((values,) if index is None else ()))
        return result.loss.to(dtype), terms, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        levels, distance, mask, index, listed, coefficients, values, *maps = ctx.saved_tensors
        near, official, backend = ctx.options
        clean = ctx.needs_input_grad[10]
        dense = index is None
        options = (near, dense, True, clean, official, backend)
        grads = noise_gradient(maps, levels, distance, mask, coefficients, grad, *options)
        if not dense:
            at = distance.gather(1, index)
            options = (near, True, False, clean, official, "eager")
            extra = noise_gradient(list(values), levels, at, listed, coefficients, grad, *options)
            image = torch.arange(len(index), device=index.device).unsqueeze(1)
            for i, (x, du) in enumerate(zip(grads, extra, strict=True), 0 if clean else 1):
                # Sorted, not atomic, on a GPU: the same bits whatever the order of equal points.
                x.index_put_((image, index), (du + grad_values[i]).to(x.dtype), accumulate=True)
        return *(None,) * 10, *((None,) if not clean else ()), *grads
