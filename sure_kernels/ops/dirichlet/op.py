"""Custom ops, their fakes and the autograd Function of `dirichlet_uncertainty`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.kernel_lib.inductor import serve
from sure_kernels.kernel_lib.launch import gradient_format
from sure_kernels.ops.dirichlet import closed_form, compiled


@custom_op("sure_kernels::dirichlet_uncertainty", recorded=False)
def dirichlet_forward(
    logits: Tensor, evidence: str, prior: Sequence[float], measures: str, backend: str
) -> list[Tensor]:
    """`measures` is comma-separated: schemas have no list of strings."""
    options = (logits, evidence, tuple(prior), tuple(measures.split(",")))
    if backend == "triton":
        from sure_kernels.ops.dirichlet import kernel

        return kernel.forward(*options)
    return serve(backend, compiled.forward, closed_form.forward, *options)


@dirichlet_forward.register_fake
def _(logits, evidence, prior, measures, backend):
    n, k, *spatial = logits.shape
    return [
        logits.new_empty((n, k if m == "probability" else 1, *spatial), dtype=working_dtype(logits.dtype))
        for m in measures.split(",")
    ]


@custom_op("sure_kernels::dirichlet_uncertainty_backward", recorded=False)
def dirichlet_backward(
    grads: Sequence[Tensor],
    logits: Tensor,
    evidence: str,
    prior: Sequence[float],
    measures: str,
    backend: str,
) -> Tensor:
    options = (list(grads), logits, evidence, tuple(prior), tuple(measures.split(",")))
    if backend == "triton":
        from sure_kernels.ops.dirichlet import kernel

        return kernel.backward(*options)
    return serve(backend, compiled.backward, closed_form.backward, *options)


@dirichlet_backward.register_fake
def _(grads, logits, evidence, prior, measures, backend):
    layout = gradient_format(logits) if backend == "triton" else torch.contiguous_format
    return torch.empty_like(logits, memory_format=layout)


class DirichletUncertaintyFunction(torch.autograd.Function):
    """Keeps the logits alone; measures without an upstream gradient cost nothing in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, evidence: str, prior: tuple, measures: str, backend: str) -> Any:
        ctx.save_for_backward(logits)
        ctx.set_materialize_grads(False)
        ctx.options = (evidence, prior, measures, backend)
        return tuple(dirichlet_forward(logits, evidence, prior, measures, backend))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        evidence, prior, measures, backend = ctx.options
        used = [(m, g) for m, g in zip(measures.split(","), grads, strict=True) if g is not None]
        if not used:
            return (None,) * 5
        names = ",".join(m for m, _ in used)
        upstream = [g for _, g in used]
        return dirichlet_backward(upstream, logits, evidence, prior, names, backend), None, None, None, None
