"""Custom ops, their fakes and the autograd Function of `supervised_evidential_loss`.

`labels` is what a backend reads beside the logits: the target itself, with `mask` and `band`, for the Triton kernels;
for the closed form one packed code a voxel, which holds all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.kernel_lib.labels import pack_labels
from sure_kernels.kernel_lib.launch import gradient_format
from sure_kernels.ops.evidential import closed_form as evidential
from sure_kernels.ops.evidential.closed_form import Formula, Weights
from sure_kernels.ops.gradient_magnitude import closed_form as gradient_magnitude
from sure_kernels.ops.supervised import closed_form
from sure_kernels.ops.supervised.closed_form import Supervision


class Filter(NamedTuple):
    """How the gradient magnitude is made of the image; `cached` says that the image already is one."""

    operator: str
    spacing: tuple[float, ...]
    padding_mode: str
    channel_reduction: str
    cached: bool


def _magnitude(
    image: Tensor, operator: str, spacing: Sequence[float], mode: str, reduction: str, cached: bool
) -> Tensor:
    if cached:
        return image.flatten(1)
    return gradient_magnitude.forward(image, operator, tuple(spacing), mode, reduction, 0.0).flatten(1)


@torch.library.custom_op("sure_kernels::supervised_sums", mutates_args=())
def supervised_sums(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    band: Tensor | None,
    ignore_index: int,
    image: Tensor,
    operator: str,
    spacing: Sequence[float],
    padding_mode: str,
    channel_reduction: str,
    cached: bool,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
    backend: str,
) -> Tensor:
    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    if backend == "triton" and band is not None:
        from sure_kernels.ops.evidential import kernel

        source = kernel.Source(band, image, (operator, tuple(spacing), padding_mode, channel_reduction), cached)
        return kernel.sums(logits, labels, mask, ignore_index, formula, source)
    g = _magnitude(image, operator, spacing, padding_mode, channel_reduction, cached)
    return evidential.sums(logits, labels, formula, g)


@supervised_sums.register_fake
def _(logits, *options):
    columns = evidential.number_of_sums(logits.shape[1], supervised=True)
    return logits.new_empty((logits.shape[0], columns), dtype=torch.float64)


@torch.library.custom_op("sure_kernels::supervised_finalise", mutates_args=())
def supervised_finalise(
    sums: Tensor,
    gradient_weight: float,
    far_weight: float,
    form: str,
    relation: str,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, terms, coefficients and means in one launch: for the Triton kernels of one process."""
    from sure_kernels.ops.supervised import kernel

    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    weights = Weights(ace_weight, kl_weight, dice_weight, dice_form, include_background)
    supervision = Supervision(gradient_weight, far_weight, form, relation)
    loss, terms, coefficients, means = kernel.finalise(sums, formula, weights, supervision)
    return loss, terms, coefficients, means


@supervised_finalise.register_fake
def _(sums, *options):
    n, k = sums.shape[0], len(options[-3])
    rows = (n, evidential.number_of_coefficients(k, supervised=True))
    return tuple(sums.new_empty(shape, dtype=torch.float32) for shape in ((), (5,), rows, (n, 2)))


@torch.library.custom_op("sure_kernels::supervised_gradient", mutates_args=())
def supervised_gradient(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    band: Tensor | None,
    ignore_index: int,
    coefficients: Tensor,
    means: Tensor,
    upstream: Tensor,
    image: Tensor,
    operator: str,
    spacing: Sequence[float],
    padding_mode: str,
    channel_reduction: str,
    cached: bool,
    kind: str,
    evidence: str,
    prior: Sequence[float],
    class_weight: Sequence[float],
    official: bool,
    backend: str,
) -> Tensor:
    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    if backend == "triton" and band is not None:
        from sure_kernels.ops.evidential import kernel

        source = kernel.Source(band, image, (operator, tuple(spacing), padding_mode, channel_reduction), cached)
        return kernel.gradient(logits, labels, mask, ignore_index, coefficients, means, upstream, formula, source)
    g = _magnitude(image, operator, spacing, padding_mode, channel_reduction, cached)
    return evidential.gradient(logits, labels, coefficients * upstream, formula, g, means)


@supervised_gradient.register_fake
def _(logits, *options):
    layout = gradient_format(logits) if options[-1] == "triton" else torch.contiguous_format
    return torch.empty_like(logits, memory_format=layout)


class SupervisedEvidentialLossFunction(torch.autograd.Function):
    """Keeps the logits, the image (the caller's own), the labels (see the module's docstring) and coefficients.

    Returns the loss and, without gradient, the terms (ACE, KL, Dice loss, C, F) as one tensor of shape (5,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        image: Tensor,
        band: Tensor,
        mask: Tensor | None,
        ignore_index: int,
        formula: Formula,
        weights: Weights,
        supervision: Supervision,
        filter_: Filter,
        process_group: Any | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        labels, bands = target, (band if backend == "triton" else None)
        if backend != "triton":
            labels, mask = pack_labels(target, mask, band, formula.k, ignore_index), None
        sums = supervised_sums(logits, labels, mask, bands, ignore_index, image, *filter_, *formula, backend)
        if backend == "triton" and process_group is None:
            loss, terms, coefficients, means = supervised_finalise(sums, *supervision, *weights, *formula)
        else:
            dtype = working_dtype(logits.dtype)
            base = evidential.finalise(all_reduced(sums.sum(0), process_group), formula, weights)
            extra = closed_form.finalise(sums, supervision, process_group)
            rows = base.coefficients.expand(len(sums), -1)
            coefficients = torch.cat((rows, extra.coefficients), 1) * world_size(process_group)
            loss, terms = (base.loss + extra.loss).to(dtype), torch.cat((base.terms, extra.terms)).to(dtype)
            means = extra.means
            if backend == "triton":
                coefficients, means = coefficients.float(), means.float()
        ctx.save_for_backward(logits, labels, mask, bands, image, coefficients, means)
        ctx.options = ignore_index, (*filter_, *formula, backend)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, mask, bands, image, coefficients, means = ctx.saved_tensors
        ignore_index, options = ctx.options
        dz = supervised_gradient(logits, labels, mask, bands, ignore_index, coefficients, means, grad, image, *options)
        return dz, *(None,) * 11
