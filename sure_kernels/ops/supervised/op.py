"""Custom ops, their fakes and the autograd Function of `supervised_evidential_loss`.

`labels` is what a backend reads beside the logits: the target itself, with `mask` and `band`, for the Triton kernels;
for the closed form one packed code a voxel, which holds all three.

The exact ranking has to see all boundary voxels before it knows the slope of any. It is found first, from a map of the
uncertainty; then the slope stands where the gradient magnitude stands otherwise, about a mean of 0, so that the same
backward sweep serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.kernel_lib.distributed import all_reduced, world_size
from sure_kernels.kernel_lib.inductor import serve
from sure_kernels.kernel_lib.labels import BOUNDARY, counted_voxels, pack_labels
from sure_kernels.kernel_lib.launch import gradient_format
from sure_kernels.ops.dirichlet.op import dirichlet_forward
from sure_kernels.ops.evidential import closed_form as evidential
from sure_kernels.ops.evidential import compiled
from sure_kernels.ops.evidential.closed_form import Formula, Weights
from sure_kernels.ops.gradient_magnitude.op import gradient_magnitude_forward, magnitude
from sure_kernels.ops.ranking.op import pairwise_ranking
from sure_kernels.ops.supervised import closed_form
from sure_kernels.ops.supervised.closed_form import Supervision
from sure_kernels.ops.supervised.reference import WITHIN_CLASS


class Filter(NamedTuple):
    """How the gradient magnitude is made of the image; `cached` says that the image already is one."""

    operator: str
    spacing: tuple[float, ...]
    padding_mode: str
    channel_reduction: str
    cached: bool


def _magnitude(
    image: Tensor, operator: str, spacing: Sequence[float], mode: str, reduction: str, cached: bool, backend: str
) -> Tensor:
    if cached:
        return image.flatten(1)
    return magnitude(image, operator, spacing, mode, reduction, 0.0, backend).flatten(1)


@custom_op("sure_kernels::supervised_sums", recorded=False)
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
    g = _magnitude(image, operator, spacing, padding_mode, channel_reduction, cached, backend)
    return serve(backend, compiled.sums, evidential.sums, logits, labels, formula, g)


@supervised_sums.register_fake
def _(logits, *options):
    columns = evidential.number_of_sums(logits.shape[1], supervised=True)
    return logits.new_empty((logits.shape[0], columns), dtype=torch.float64)


@custom_op("sure_kernels::supervised_evidential_loss", recorded=False)
def supervised_forward(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    band: Tensor,
    ignore_index: int,
    image: Tensor,
    operator: str,
    spacing: Sequence[float],
    padding_mode: str,
    channel_reduction: str,
    cached: bool,
    gradient_weight: float,
    far_weight: float,
    form: str,
    relation: str,
    margin: float,
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
    """Loss, terms, coefficients and means: for the Triton kernels of one process."""
    from sure_kernels.ops.evidential.kernel import Source, sums
    from sure_kernels.ops.supervised.kernel import finalise

    formula = Formula(kind, evidence, tuple(prior), tuple(class_weight), official)
    weights = Weights(ace_weight, kl_weight, dice_weight, dice_form, include_background)
    supervision = Supervision(gradient_weight, far_weight, form, relation, margin)
    source = Source(band, image, (operator, tuple(spacing), padding_mode, channel_reduction), cached)
    summed = sums(logits, labels, mask, ignore_index, formula, source)
    loss, terms, coefficients, means = finalise(summed, formula, weights, supervision)
    return loss, terms, coefficients, means


@supervised_forward.register_fake
def _(logits, *options):
    n, k = logits.shape[:2]
    rows = (n, evidential.number_of_coefficients(k, supervised=True))
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), (5,), rows, (n, 2)))


@custom_op("sure_kernels::supervised_gradient", recorded=False)
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
    g = _magnitude(image, operator, spacing, padding_mode, channel_reduction, cached, backend)
    rows = coefficients * upstream
    return serve(backend, compiled.gradient, evidential.gradient, logits, labels, rows, formula, g, means)


@supervised_gradient.register_fake
def _(logits, *options):
    layout = gradient_format(logits) if options[-1] == "triton" else torch.contiguous_format
    return torch.empty_like(logits, memory_format=layout)


def _ranked(
    logits: Tensor,
    target: Tensor,
    image: Tensor,
    band: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    formula: Formula,
    supervision: Supervision,
    filter_: Filter,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The exact ranking of vacuity against gradient magnitude on the boundary: loss (N,), slope (N, 1, *spatial)."""
    options = (filter_.operator, filter_.spacing, filter_.padding_mode, filter_.channel_reduction, 0.0, backend)
    magnitude = image if filter_.cached else gradient_magnitude_forward(image, *options)
    (u,) = dirichlet_forward(logits, formula.evidence, formula.prior, "vacuity", backend)
    on = (band == BOUNDARY) & counted_voxels(target, ignore_index, mask)
    groups = target.flatten(1) if supervision.form == WITHIN_CLASS else None
    rows = (u.flatten(1), magnitude.flatten(1), on.flatten(1), groups)
    loss, slope = pairwise_ranking(*rows, supervision.relation, "exact", None, False, backend)
    return loss, slope.view(u.shape)


class SupervisedEvidentialLossFunction(torch.autograd.Function):
    """Keeps the logits, the labels, the image (the caller's own; for the exact ranking its slope) and coefficients.

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
        exact = supervision.form in ("exact", WITHIN_CLASS)
        if exact:
            options = (formula, supervision, filter_, backend)
            ranking, image = _ranked(logits, target, image, band, mask, ignore_index, *options)
            filter_, weight = filter_._replace(cached=True), supervision.gradient_weight
            supervision = supervision._replace(form="covariance", gradient_weight=0.0)
        labels, bands = target, (band if backend == "triton" else None)
        if backend != "triton":
            labels, mask = pack_labels(target, mask, band, formula.k, ignore_index), None
        read = (logits, labels, mask, bands, ignore_index, image, *filter_)
        if backend == "triton" and process_group is None:
            loss, terms, coefficients, means = supervised_forward(*read, *supervision, *weights, *formula)
        else:
            sums = supervised_sums(*read, *formula, backend)
            dtype = working_dtype(logits.dtype)
            base = evidential.finalise(all_reduced(sums.sum(0), process_group), formula, weights)
            extra = closed_form.finalise(sums, supervision, process_group)
            rows = base.coefficients.expand(len(sums), -1)
            coefficients = torch.cat((rows, extra.coefficients), 1) * world_size(process_group)
            loss, terms = (base.loss + extra.loss).to(dtype), torch.cat((base.terms, extra.terms)).to(dtype)
            means = extra.means
            if backend == "triton":
                coefficients, means = coefficients.float(), means.float()
        if exact:
            ranking = all_reduced(torch.stack((ranking.sum(), ranking.new_full((), len(ranking)))), process_group)
            ranking, share = ranking[0] / ranking[1], weight * world_size(process_group) / ranking[1]
            loss, means = loss + (weight * ranking).to(loss.dtype), torch.zeros_like(means)
            terms = torch.cat((terms[:3], ranking.to(terms.dtype).view(1), terms[4:]))
            coefficients[:, evidential.number_of_coefficients(formula.k, supervised=False)] = share
        ctx.save_for_backward(logits, labels, mask, bands, image, coefficients, means)
        ctx.options = ignore_index, (*filter_, *formula, backend)
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        logits, labels, mask, bands, image, coefficients, means = ctx.saved_tensors
        ignore_index, options = ctx.options
        dz = supervised_gradient(logits, labels, mask, bands, ignore_index, coefficients, means, grad, image, *options)
        return dz, *(None,) * 11
