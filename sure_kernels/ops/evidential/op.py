"""Custom ops, their fakes and the autograd Function of `evidential_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.kernel_lib.labels import pack_labels
from sure_kernels.ops.evidential import closed_form
from sure_kernels.ops.evidential.closed_form import Formula, Weights


@torch.library.custom_op("sure_kernels::evidential_sums", mutates_args=())
def evidential_sums(
    logits: Tensor,
    labels: Tensor,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
    backend: str,
) -> Tensor:
    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    return closed_form.sums(logits, labels, formula)


@evidential_sums.register_fake
def _(logits, labels, kind, evidence, prior, class_weight, official, backend):
    columns = closed_form.number_of_sums(logits.shape[1], supervised=False)
    return logits.new_empty((logits.shape[0], columns), dtype=torch.float64)


@torch.library.custom_op("sure_kernels::evidential_gradient", mutates_args=())
def evidential_gradient(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
    backend: str,
) -> Tensor:
    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    return closed_form.gradient(logits, labels, coefficients, formula)


@evidential_gradient.register_fake
def _(logits, labels, coefficients, kind, evidence, prior, class_weight, official, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class EvidentialLossFunction(torch.autograd.Function):
    """Keeps the logits, one small integer a voxel and a handful of coefficients.

    Returns the loss and, without gradient, the terms (ACE, KL, Dice loss) as one tensor of shape (3,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        ignore_index: int,
        formula: Formula,
        weights: Weights,
        process_group: Any | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        labels = pack_labels(target, mask, None, formula.k, ignore_index)
        sums = evidential_sums(logits, labels, *formula, backend)
        loss, terms, coefficients = closed_form.finalise(
            all_reduced(sums.sum(0), process_group), formula, weights
        )
        coefficients = coefficients * world_size(process_group)
        ctx.save_for_backward(logits, labels, coefficients)
        ctx.formula, ctx.backend = formula, backend
        dtype = working_dtype(logits.dtype)
        terms = terms.to(dtype)
        ctx.mark_non_differentiable(terms)
        return loss.to(dtype), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, coefficients = ctx.saved_tensors
        rows = (coefficients * grad).expand(logits.shape[0], -1)
        dz = evidential_gradient(logits, labels, rows, *ctx.formula, ctx.backend)
        return dz, *(None,) * 7
