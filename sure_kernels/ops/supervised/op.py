"""Custom ops, their fakes and the autograd Function of `supervised_evidential_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.kernel_lib.labels import pack_labels
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
    g = _magnitude(image, operator, spacing, padding_mode, channel_reduction, cached)
    return evidential.sums(logits, labels, formula, g)


@supervised_sums.register_fake
def _(logits, labels, *options):
    columns = evidential.number_of_sums(logits.shape[1], supervised=True)
    return logits.new_empty((logits.shape[0], columns), dtype=torch.float64)


@torch.library.custom_op("sure_kernels::supervised_gradient", mutates_args=())
def supervised_gradient(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    means: Tensor,
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
    g = _magnitude(image, operator, spacing, padding_mode, channel_reduction, cached)
    return evidential.gradient(logits, labels, coefficients, formula, g, means)


@supervised_gradient.register_fake
def _(logits, labels, coefficients, means, *options):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class SupervisedEvidentialLossFunction(torch.autograd.Function):
    """Keeps the logits, the image (the caller's own), one small integer a voxel and a handful of coefficients.

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
        labels = pack_labels(target, mask, band, formula.k, ignore_index)
        sums = supervised_sums(logits, labels, image, *filter_, *formula, backend)
        base = evidential.finalise(all_reduced(sums.sum(0), process_group), formula, weights)
        extra = closed_form.finalise(sums, supervision, process_group)
        rows = base.coefficients.expand(len(sums), -1)
        coefficients = torch.cat((rows, extra.coefficients), 1) * world_size(process_group)
        ctx.save_for_backward(logits, labels, image, coefficients, extra.means)
        ctx.options = (*filter_, *formula, backend)
        dtype = working_dtype(logits.dtype)
        terms = torch.cat((base.terms, extra.terms)).to(dtype)
        ctx.mark_non_differentiable(terms)
        return (base.loss + extra.loss).to(dtype), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, image, coefficients, means = ctx.saved_tensors
        dz = supervised_gradient(logits, labels, coefficients * grad, means, image, *ctx.options)
        return dz, *(None,) * 11
