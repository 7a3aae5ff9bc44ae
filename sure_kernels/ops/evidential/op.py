"""Custom ops, their fakes and the autograd Function of `evidential_loss`.

`labels` is what a backend reads beside the logits: the target itself, with `mask`, for the Triton kernels; for the
closed form one packed code a voxel, which holds target and mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.kernel_lib.inductor import serve
from sure_kernels.kernel_lib.labels import pack_labels
from sure_kernels.kernel_lib.launch import gradient_format
from sure_kernels.ops.evidential import closed_form, compiled
from sure_kernels.ops.evidential.closed_form import Formula, Weights


@custom_op("sure_kernels::evidential_sums", recorded=False)
def evidential_sums(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
    backend: str,
) -> Tensor:
    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    if backend == "triton":
        from sure_kernels.ops.evidential import kernel

        return kernel.sums(logits, labels, mask, ignore_index, formula)
    return serve(backend, compiled.sums, closed_form.sums, logits, labels, formula)


@evidential_sums.register_fake
def _(logits, *options):
    columns = closed_form.number_of_sums(logits.shape[1], supervised=False)
    return logits.new_empty((logits.shape[0], columns), dtype=torch.float64)


@custom_op("sure_kernels::evidential_loss", recorded=False)
def evidential_forward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    ace_weight: float,
    kl_weight: float,
    dice_weight: float,
    dice_form: str,
    include_background: bool,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, terms and the row of coefficients: for the Triton kernels of one process."""
    from sure_kernels.ops.evidential import kernel

    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    weights = Weights(ace_weight, kl_weight, dice_weight, dice_form, include_background)
    loss, terms, coefficients = kernel.finalise(
        kernel.sums(logits, labels, mask, ignore_index, formula), formula, weights
    )
    return loss, terms, coefficients


@evidential_forward.register_fake
def _(logits, *options):
    row = (1, closed_form.number_of_coefficients(logits.shape[1], supervised=False))
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), row))


@custom_op("sure_kernels::evidential_gradient", recorded=False)
def evidential_gradient(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    coefficients: Tensor,
    upstream: Tensor,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
    backend: str,
) -> Tensor:
    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    if backend == "triton":
        from sure_kernels.ops.evidential import kernel

        return kernel.gradient(logits, labels, mask, ignore_index, coefficients, None, upstream, formula)
    rows = (coefficients * upstream).expand(logits.shape[0], -1)
    return serve(backend, compiled.gradient, closed_form.gradient, logits, labels, rows, formula)


@evidential_gradient.register_fake
def _(logits, *options):
    layout = gradient_format(logits) if options[-1] == "triton" else torch.contiguous_format
    return torch.empty_like(logits, memory_format=layout)


class EvidentialLossFunction(torch.autograd.Function):
    """Keeps the logits, the labels (see the module's docstring) and a handful of coefficients.

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
        labels = target
        if backend != "triton":
            labels, mask = pack_labels(target, mask, None, formula.k, ignore_index), None
        if backend == "triton" and process_group is None:
            loss, terms, coefficients = evidential_forward(logits, labels, mask, ignore_index, *weights, *formula)
        else:
            sums = evidential_sums(logits, labels, mask, ignore_index, *formula, backend)
            dtype = working_dtype(logits.dtype)
            base = closed_form.finalise(all_reduced(sums.sum(0), process_group), formula, weights)
            loss, terms = base.loss.to(dtype), base.terms.to(dtype)
            coefficients = (base.coefficients * world_size(process_group)).unsqueeze(0)
            if backend == "triton":
                coefficients = coefficients.float()
        ctx.save_for_backward(logits, labels, mask, coefficients)
        ctx.options = ignore_index, formula, backend
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        logits, labels, mask, coefficients = ctx.saved_tensors
        ignore_index, formula, backend = ctx.options
        dz = evidential_gradient(logits, labels, mask, ignore_index, coefficients, grad, *formula, backend)
        return dz, *(None,) * 7
