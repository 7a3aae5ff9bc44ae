"""Custom op, its fake and the autograd Function of `pairwise_ranking_loss`.

The forward finds loss and gradient together; what is kept for backward is the gradient, to be scaled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.ops.ranking import closed_form


class Method(NamedTuple):
    """How points are ranked."""

    relation: str
    name: str
    num_pairs: int | None
    official: bool


@custom_op("sure_kernels::pairwise_ranking", recorded=False)
def pairwise_ranking(
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    groups: Tensor | None,
    relation: str,
    method: str,
    num_pairs: int | None,
    official: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss (N,) float64 and its slope (N, n) by `values`, of rows (N, n): `exact` or `covariance`."""
    sets = closed_form.sets_of(values, scores, mask, groups, relation)
    if method == "covariance":
        loss, slope = closed_form.covariance(sets)
    else:
        if backend == "triton":
            from sure_kernels.ops.ranking import kernel

            pairs = kernel.violating_pairs(sets)
        else:
            pairs = closed_form.violating_pairs(sets)
        times = closed_form.official_times(sets, num_pairs, groups is not None) if official else None
        loss, slope = closed_form.exact(sets, pairs, times)
    return loss, closed_form.on_rows(sets, slope, values.shape, working_dtype(values.dtype))


@pairwise_ranking.register_fake
def _(values, *options):
    loss = values.new_empty(values.shape[:1], dtype=torch.float64)
    return loss, values.new_empty(values.shape, dtype=working_dtype(values.dtype))


def _sampled(
    values: Tensor, scores: Tensor, mask: Tensor | None, groups: Tensor | None, method: Method, generator: Any | None
) -> tuple[Tensor, Tensor]:
    """As `pairwise_ranking`, over pairs drawn from a generator, which no custom op can take."""
    sets = closed_form.sets_of(values, scores, mask, None, method.relation)
    sizes = sets.sizes.tolist()
    if method.official:
        drawn = closed_form.published_samples(sizes, method.num_pairs)
    else:
        drawn = [(n if method.num_pairs is None else method.num_pairs) if n > 1 else 0 for n in sizes]
    if groups is not None:
        groups = groups.flatten() if sets.index is None else groups.flatten()[sets.index]
    loss, slope = closed_form.sampled(sets, groups, drawn, generator, method.official)
    return loss, closed_form.on_rows(sets, slope, values.shape, working_dtype(values.dtype))


def concordant_pairs(sets: closed_form.Sets, backend: str) -> Tensor:
    """(sets,) int64: pairs with (x_i - x_j)(y_i - y_j) > 0, the ones that a decreasing relation is violated by."""
    if backend == "triton":
        from sure_kernels.ops.ranking import kernel

        return kernel.violating_pairs(sets).number
    return closed_form.concordant_pairs(sets)


class PairwiseRankingFunction(torch.autograd.Function):
    """The mean over images of their ranking loss, 0-d; keeps its slope."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scores: Tensor,
        mask: Tensor | None,
        groups: Tensor | None,
        method: Method,
        generator: Any | None,
        process_group: Any | None,
        backend: str,
    ) -> Tensor:
        if method.name == "sampled":
            rows, slope = _sampled(values, scores, mask, groups, method, generator)
        else:
            rows, slope = pairwise_ranking(values, scores, mask, groups, *method, backend)
        total = torch.stack((rows.sum(), rows.new_full((), len(rows))))
        total = all_reduced(total, process_group)
        ctx.save_for_backward(slope, world_size(process_group) / total[1])
        ctx.dtype = values.dtype
        return (total[0] / total[1]).to(slope.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, share = ctx.saved_tensors
        return (slope * (grad * share).to(slope.dtype)).to(ctx.dtype), *(None,) * 7
