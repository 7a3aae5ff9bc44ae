"""The public functions: what they compute, what they accept, and the dispatch to a backend.

Shapes: N images, K classes, M image channels, `*spatial` two or three axes. `target` is an index map (N, *spatial)
or (N, 1, *spatial) of any integer dtype, or one-hot (N, K, *spatial). `mask` is boolean or 0/1, (N, *spatial) or
(N, 1, *spatial), True = counts. Logits are float32, bfloat16, float16 or float64 in any memory layout; arithmetic is
float32 (float64 for float64), gradients return in the dtype that came. Gradients are not differentiable again but with
backend `reference`: torch treats them as constants.
"""

from __future__ import annotations

import contextlib
import math
from collections import namedtuple
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels import validation as check
from sure_kernels.backends import dispatch, get_backend, requested
from sure_kernels.kernel_lib.chunks import working_dtype
from sure_kernels.kernel_lib.labels import FAR, counted_voxels
from sure_kernels.kernel_lib.random import normal, uniform
from sure_kernels.kernel_lib.special import EVIDENCE
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES
from sure_kernels.metrics import points
from sure_kernels.ops.boundary_distance import op as distance_op
from sure_kernels.ops.boundary_distance import reference as distance_reference
from sure_kernels.ops.boundary_distance.closed_form import band_of
from sure_kernels.ops.boundary_distance.codes import reach
from sure_kernels.ops.dirichlet import reference as dirichlet_reference
from sure_kernels.ops.dirichlet.op import DirichletUncertaintyFunction
from sure_kernels.ops.dirichlet.reference import MEASURES
from sure_kernels.ops.evidential import reference as evidential_reference
from sure_kernels.ops.evidential.closed_form import Formula, Weights
from sure_kernels.ops.evidential.op import EvidentialLossFunction
from sure_kernels.ops.gradient_magnitude import reference as gradient_reference
from sure_kernels.ops.gradient_magnitude.op import GradientMagnitudeFunction
from sure_kernels.ops.noise import reference as noise_reference
from sure_kernels.ops.noise.op import NoiseUncertaintyFunction
from sure_kernels.ops.noise_patches import op as patches_op
from sure_kernels.ops.noise_patches import reference as patches_reference
from sure_kernels.ops.ranking import reference as ranking_reference
from sure_kernels.ops.ranking.op import Method, PairwiseRankingFunction
from sure_kernels.ops.soft import op as soft_op
from sure_kernels.ops.soft import reference as soft_reference
from sure_kernels.ops.soft.reference import SoftThresholds
from sure_kernels.ops.supervised import reference as supervised_reference
from sure_kernels.ops.supervised.closed_form import Supervision
from sure_kernels.ops.supervised.op import Filter, SupervisedEvidentialLossFunction

KINDS = ("digamma", "log", "mse")
DICE_FORMS = ("adaptive_tversky", "soft")
RELATIONS = ("decreasing", "increasing")
RANKINGS = ("exact", "sampled", "covariance")
SUPERVISIONS = ("covariance", "correlation", "exact")
# Pairs and patches of an image, windows of the soft forms: far above what is of use, below what no machine holds.
MOST_PAIRS = 2**31 - 1
MOST_PATCHES = 2**16
WIDEST_WINDOW = 255


class EvidentialTerms(NamedTuple):
    """Unweighted, detached terms of `evidential_loss`: 0-d tensors."""

    ace: Tensor
    kl: Tensor
    dice: Tensor


class SupervisedTerms(NamedTuple):
    """Unweighted, detached terms of `supervised_evidential_loss`: 0-d tensors."""

    ace: Tensor
    kl: Tensor
    dice: Tensor
    gradient: Tensor
    far: Tensor


class NoiseTerms(NamedTuple):
    """Unweighted, detached terms of `noise_uncertainty_loss`: 0-d tensors."""

    mu: Tensor
    d: Tensor
    far: Tensor


class NoisePatches(NamedTuple):
    """What `sample_noise_patches` returns.

    Attributes:
        images: two images, each with noise of its own in the same patches.
        means: of the two noises, (2,) float32.
        centres: of the patches, (N, P, ndim) int64 in array-axis order, -1 where there is none.
    """

    images: tuple[Tensor, Tensor]
    means: Tensor
    centres: Tensor


def gradient_magnitude(
    image: Tensor,
    *,
    operator: str = "sobel",
    spacing: check.Numbers | None = None,
    padding_mode: str = "replicate",
    channel_reduction: str = "l2",
    eps: float = 0.0,
) -> Tensor:
    """Gradient magnitude of an image, normalised so that a ramp of slope s per unit spacing gives s.

    Args:
        image: (N, M, *spatial), floating point. Differentiable.
        operator: `sobel` (smoothed by [1, 2, 1] / 4 across the other axes), `scharr` ([3, 10, 3] / 16) or `central`.
        spacing: voxel spacing in array-axis order; 1 where None.
        padding_mode: `replicate`, `reflect`, `zeros`, or `extrapolate` (2 a - b: with `central` this is
            numpy.gradient, border included). An axis of length 1 has no neighbour to reflect or extrapolate from
            and is replicated.
        channel_reduction: `l2` (root of the summed squares), `max` or `mean` of the channels' magnitudes.
        eps: the result is sqrt(g^2 + eps^2). With 0 the derivative at a flat voxel is 0, never NaN.

    Returns:
        (N, 1, *spatial), float32 (float64 for float64 images), in image units per unit of spacing; not finite at and
        beside a voxel that is not.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    x = check.check_float_map(image, "image")
    options = check_filter(operator, spacing, padding_mode, channel_reduction, eps, ndim=x.ndim - 2)
    backend = dispatch(x, "gradient_magnitude")
    if backend == "reference":
        return gradient_reference.gradient_magnitude(x, *options)
    return GradientMagnitudeFunction.apply(x, *options, backend)


@check.remembered
def check_filter(
    operator: str,
    spacing: check.Numbers | None,
    padding_mode: str,
    channel_reduction: str,
    eps: float = 0.0,
    *,
    ndim: int | None = None,
) -> tuple[str, tuple[float, ...], str, str, float]:
    """The options of `gradient_magnitude`; the number of axes goes unchecked where `ndim` is not known yet."""
    return (
        check.check_choice(operator, "operator", OPERATORS),
        check.check_spacing(spacing, ndim),
        check.check_choice(padding_mode, "padding_mode", PADDING_MODES),
        check.check_choice(channel_reduction, "channel_reduction", CHANNEL_REDUCTIONS),
        check.check_number(eps, "eps"),
    )


def dirichlet_uncertainty(
    logits: Tensor,
    *,
    evidence: str = "softplus",
    prior: check.Numbers = 1.0,
    measures: tuple[str, ...] | list[str] | str = ("probability", "vacuity"),
) -> Any:
    """Measures of the Dirichlet distribution that the logits stand for, in one pass. Differentiable.

    With evidence e = act(z), concentration a = e + prior and strength S = sum a: `probability` a / S, `vacuity`
    sum prior / S, `entropy` of the probability, `expected_entropy` (aleatoric), `mutual_information` (epistemic),
    `differential_entropy`, all in nats, and `dissonance` of the beliefs e / S (Jøsang, Cho, Chen, FUSION 2018).

    Args:
        logits: (N, K, *spatial).
        evidence: `softplus`, `relu` or `exp` (of logits clamped to [-10, 10]).
        prior: one number or K of them (floats, or a tensor, which is read back to the host), each at least 1e-3.
        measures: the names wanted, without repetition.

    Returns:
        A NamedTuple with the measures asked for, in that order: `probability` is (N, K, *spatial), every other
        (N, 1, *spatial); float32 (float64 for float64 logits). NaN where a logit of the voxel is NaN; where one is
        infinite, a limit or NaN, which backends need not agree on.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    z = check.check_logits(logits)
    evidence, b, names = check_dirichlet(evidence, prior, measures, z.shape[1])
    backend = dispatch(z, "dirichlet_uncertainty")
    if backend == "reference":
        values = dirichlet_reference.dirichlet_uncertainty(z, evidence=evidence, prior=b, measures=names)
    else:
        values = DirichletUncertaintyFunction.apply(z, evidence, b, ",".join(names), backend)
    return _result_type(names)(*values)


@check.remembered
def check_dirichlet(
    evidence: str, prior: check.Numbers, measures: tuple[str, ...] | list[str] | str, k: int | None = None
) -> tuple[str, tuple[float, ...], tuple[str, ...]]:
    """The options of `dirichlet_uncertainty`; the prior's length goes unchecked where K is not known yet."""
    if not isinstance(measures, (str, tuple, list)):
        raise TypeError(f"measures: expected a tuple of names, got {type(measures).__name__}")
    names = (measures,) if isinstance(measures, str) else tuple(measures)
    for name in names:
        check.check_choice(name, "measures", MEASURES)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"measures: expected one or more different names, got {names}")
    return check.check_choice(evidence, "evidence", EVIDENCE), check.check_prior(prior, k), names


def _result_type(names: tuple[str, ...]) -> Any:
    """The NamedTuple with these fields, made once; collections.namedtuple is what torch.compile can trace."""
    if names not in _RESULT_TYPES:
        _RESULT_TYPES[names] = namedtuple("DirichletMeasures", names)
    return _RESULT_TYPES[names]


_RESULT_TYPES: dict[tuple[str, ...], Any] = {}


class _Common(NamedTuple):
    """Checked arguments that both losses share."""

    logits: Tensor
    target: Tensor
    mask: Tensor | None
    ignore_index: int
    formula: Formula
    weights: Weights
    backend: str
    values_read: bool


@check.remembered
def check_evidential(
    *,
    kind: str,
    evidence: str,
    prior: check.Numbers,
    ace_weight: float,
    kl_weight: float,
    dice_weight: float,
    dice: str,
    class_weight: check.Numbers | None,
    include_background: bool,
    ignore_index: int,
    process_group: Any | None,
    compat: str | None,
    return_terms: bool,
    k: int | None = None,
) -> tuple[Formula, Weights, int]:
    """The options of `evidential_loss`; lengths go unchecked where K is not known yet."""
    formula = Formula(
        check.check_choice(kind, "kind", KINDS),
        check.check_choice(evidence, "evidence", EVIDENCE),
        check.check_prior(prior, k),
        check.check_class_weight(class_weight, k) or (),
        check.check_compat(compat),
    )
    weights = Weights(
        check.check_number(ace_weight, "ace_weight"),
        check.check_number(kl_weight, "kl_weight"),
        check.check_number(dice_weight, "dice_weight"),
        check.check_choice(dice, "dice", DICE_FORMS),
        check.check_bool(include_background, "include_background"),
    )
    check.check_process_group(process_group)
    check.check_bool(return_terms, "return_terms")
    return formula, weights, check.check_int(ignore_index, "ignore_index")


def _check_loss(tensors: tuple[Any, ...], **options: Any) -> check.Checked:
    """Logits, target and mask of a loss, and (formula, weights, ignore_index)."""
    logits, target, mask = tensors
    z = check.check_logits(logits)
    n, k, *spatial = z.shape
    formula, weights, ignore_index = check_evidential(k=k, **options)
    counted = check.check_mask(mask, n, spatial, z)
    labels = check.check_target(target, z, ignore_index, counted)
    return (z, labels, counted), (formula, weights, ignore_index)


_checked_loss = check.unless_alike(_check_loss)


def _reference_terms(common: _Common, process_group: Any | None) -> tuple[Tensor, Tensor, Tensor]:
    formula, weights = common.formula, common.weights
    return evidential_reference.evidential_terms(
        common.logits,
        common.target,
        kind=formula.kind,
        evidence=formula.evidence,
        prior=formula.prior,
        dice=weights.dice_form,
        class_weight=formula.class_weight or None,
        include_background=weights.include_background,
        ignore_index=common.ignore_index,
        mask=common.mask,
        process_group=process_group,
        official=formula.official,
    )


def _explain(loss: Tensor, common: _Common, process_group: Any | None, **read: Tensor) -> None:
    """Name the voxel when the loss is not finite because the logits, or what else was `read`, were not."""
    if not common.values_read or math.isfinite(loss.item()):
        return
    check.explain_non_finite(common.logits, counted_voxels(common.target, common.ignore_index, common.mask))
    for name, given in read.items():
        check.explain_non_finite(given, torch.ones_like(common.target, dtype=torch.bool), name)
    if process_group is None:  # or else the cause may lie on another rank
        largest = float(common.logits.detach().abs().nan_to_num(0, 0, 0).max())
        raise ValueError(
            f"logits: expected a loss that {common.logits.dtype} arithmetic holds, got {float(loss.detach())} from "
            f"logits up to {largest:.3g} with the given prior and weights"
        )


def evidential_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "digamma",
    evidence: str = "softplus",
    prior: check.Numbers = 1.0,
    ace_weight: float = 1.0,
    kl_weight: float = 1.0,
    dice_weight: float = 1.0,
    dice: str = "adaptive_tversky",
    class_weight: check.Numbers | None = None,
    include_background: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    process_group: Any | None = None,
    compat: str | None = None,
    return_terms: bool = False,
) -> Any:
    """Evidential segmentation loss: ace_weight * ACE + kl_weight * KL + dice_weight * (1 - Dice).

    ACE is the expected cross-entropy (`digamma`), its `log` or `mse` form (Sensoy et al., NeurIPS 2018), KL the
    divergence of the wrong classes' evidence from the prior; both are means over counted voxels. Dice is taken over
    the whole batch, `adaptive_tversky` (Li et al., MICCAI 2025) or `soft`, and averaged over classes.

    Args:
        logits: (N, K, *spatial), K >= 2.
        target: index map or one-hot, see the module's docstring.
        kind: `digamma`, `log` or `mse`.
        evidence: `softplus`, `relu` or `exp`.
        prior: one number or K of them, each at least 1e-3. Large ones cost float32 some digits: up to 400 KL keeps a
            relative 2e-5 and its gradient, beside its largest entry, 3e-5.
        dice: `adaptive_tversky` or `soft`.
        class_weight: K numbers; weights ACE and KL by the voxel's class and divides by their sum, and Dice by
            w_k / sum w. Always K long, whatever `include_background`.
        include_background: False drops class 0 from Dice only.
        ignore_index: label of voxels that contribute to no sum and get exactly zero gradient.
        mask: voxels that count.
        process_group: sums run over its ranks; gradients follow DistributedDataParallel's averaging.
        compat: "official" reproduces the published programs: the squared error of `mse` counted K times, and 1 in
            place of the true class's prior in KL.
        return_terms: also return EvidentialTerms(ace, kl, dice), unweighted and detached.

    Returns:
        0-d float32 (float64 for float64 logits). Exactly 0, with zero gradient, where no voxel counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    values_read = check.values_read(logits)
    (z, labels, counted), (formula, w, ignored) = _checked_loss(
        values_read,
        (logits, target, mask),
        kind=kind,
        evidence=evidence,
        prior=prior,
        ace_weight=ace_weight,
        kl_weight=kl_weight,
        dice_weight=dice_weight,
        dice=dice,
        class_weight=class_weight,
        include_background=include_background,
        ignore_index=ignore_index,
        process_group=process_group,
        compat=compat,
        return_terms=return_terms,
    )
    common = _Common(z, labels, counted, ignored, formula, w, dispatch(z, "evidential_loss"), values_read)
    if common.backend == "reference":
        ace, kl, dice_term = _reference_terms(common, process_group)
        loss = w.ace * ace + w.kl * kl + w.dice * dice_term
        stacked = torch.stack((ace, kl, dice_term)).detach()
    else:
        loss, stacked = EvidentialLossFunction.apply(
            common.logits,
            common.target,
            common.mask,
            common.ignore_index,
            common.formula,
            w,
            process_group,
            common.backend,
        )
    _explain(loss, common, process_group)
    return (loss, EvidentialTerms(*stacked.unbind())) if return_terms else loss


def boundary_distance(
    target: Tensor,
    *,
    max_distance: float | None = None,
    spacing: check.Numbers | None = None,
    spatial_dims: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Exact Euclidean distance to the thick boundary of any foreground class.

    A voxel is boundary when its 3^ndim neighbourhood, cut at the image border, is not constant in "belongs to class
    c" for some c >= 1: the union of scikit-image's `find_boundaries(target == c, mode="thick")`, as in the published
    program. Ignored voxels make no boundary.

    Args:
        target: index map, never one-hot: (N, *spatial), or (N, 1, *spatial) where `spatial_dims` or the length of
            `spacing` says so; (N, 1, H, W) by itself is a volume one slice deep. Any integer dtype, or boolean. Labels
            below 1 are background.
        max_distance: exact up to here, +inf beyond (values within 1e-5 relative may fall on either side). A few
            voxels, as the losses need, are found several times as fast as the whole map.
        spacing: voxel spacing in array-axis order; 1 where None. Distances are in its unit.
        spatial_dims: 2 or 3; by default every dimension after the first.

    Returns:
        Float32 (N, 1, *spatial); +inf everywhere in an image without a boundary. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    labels, steps = _check_index_map(target, spacing, spatial_dims)
    if max_distance is not None:
        max_distance = check.check_number(max_distance, "max_distance", infinite=True, largest=check.FLOAT64_MAX)
    ignore_index = check.check_int(ignore_index, "ignore_index")
    backend = get_backend(labels, "boundary_distance")
    if backend == "reference":
        return distance_reference.boundary_distance(
            labels, max_distance=max_distance, spacing=steps, ignore_index=ignore_index
        )
    return distance_op.boundary_distance(labels, max_distance, steps, ignore_index, backend)


def _check_index_map(
    target: Tensor, spacing: check.Numbers | None, spatial_dims: int | None
) -> tuple[Tensor, tuple[float, ...]]:
    """Labels (N, *spatial) and the spacing of their axes."""
    labels = check.plain_tensor(target, "target")
    if labels.dtype not in (*check.INT_DTYPES, torch.bool):
        raise TypeError(f"target: expected an integer index map, got {labels.dtype}; target.long() has it")
    if spatial_dims is not None and check.check_int(spatial_dims, "spatial_dims") not in (2, 3):
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims}")
    ndim = spatial_dims
    if ndim is None and spacing is not None:
        steps = check.check_spacing(spacing, None)
        if len(steps) > 3:
            raise ValueError(f"spacing: expected one number or 2 or 3, one per spatial axis, got {len(steps)}")
        ndim, spacing = (len(steps), steps) if len(steps) > 1 else (None, spacing)
    if ndim is None:
        ndim = labels.ndim - 1
    if ndim not in (2, 3):
        channel = "; with a channel axis also spatial_dims=3" if labels.ndim == 5 and labels.shape[1] == 1 else ""
        raise ValueError(
            f"target: expected shape (N, *spatial) with 2 or 3 spatial axes{channel}, got {check.shape_of(labels)}"
        )
    if labels.ndim == ndim + 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != ndim + 1 or 0 in labels.shape:
        raise ValueError(
            f"target: expected shape (N, *spatial) or (N, 1, *spatial) with {ndim} spatial axes, none of length 0, "
            f"got {check.shape_of(labels)}"
        )
    return labels, check.check_spacing(spacing, ndim)


def boundary_band(
    target: Tensor,
    *,
    near: float = 4.0,
    far: float = 4.0,
    boundary: float = 1.0,
    spacing: check.Numbers | None = None,
    spatial_dims: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Where each voxel lies relative to the boundary, one byte a voxel: what the fused loss reads.

    2 on the boundary (d <= boundary), 1 near it (d <= near), 0 between, 3 far (d > far), with d and the other
    arguments as in `boundary_distance`. A distance equal to a threshold but for rounding counts as within.

    Returns:
        uint8 (N, 1, *spatial).

    Raises:
        ValueError: unless boundary <= near <= far; and as `boundary_distance`.
    """
    labels, steps = _check_index_map(target, spacing, spatial_dims)
    thresholds = check_thresholds(boundary, near, far)
    ignore_index = check.check_int(ignore_index, "ignore_index")
    return _band(labels, thresholds, steps, ignore_index, get_backend(labels, "boundary_band"))


def _band(
    labels: Tensor,
    thresholds: tuple[float, float, float],
    spacing: tuple[float, ...],
    ignore_index: int,
    backend: str,
) -> Tensor:
    if backend == "reference":
        boundary, near, far = thresholds
        return distance_reference.boundary_band(
            labels, boundary=boundary, near=near, far=far, spacing=spacing, ignore_index=ignore_index
        )
    return distance_op.boundary_band(labels, *thresholds, spacing, ignore_index, backend)


@check.remembered
def check_thresholds(boundary: float, near: float, far: float) -> tuple[float, float, float]:
    boundary = check.check_number(boundary, "boundary", largest=check.FLOAT64_MAX)
    near = check.check_number(near, "near", largest=check.FLOAT64_MAX)
    far = check.check_number(far, "far", largest=check.FLOAT64_MAX)
    if not boundary <= near <= far:
        raise ValueError(f"boundary, near, far: expected boundary <= near <= far, got {boundary:g}, {near:g}, {far:g}")
    return boundary, near, far


@check.remembered
def check_supervision(
    supervision: str, within_class: bool, gradient_weight: float, far_weight: float, relation: str, margin: float
) -> Supervision:
    """What `supervised_evidential_loss` adds to the evidential loss."""
    form = check.check_choice(supervision, "supervision", SUPERVISIONS)
    if check.check_bool(within_class, "within_class") and form != "exact":
        raise ValueError(f"within_class: expected supervision='exact' with it, got {supervision!r}")
    checked = check.check_number(margin, "margin")
    if checked > 1:
        raise ValueError(f"margin: expected a correlation from 0 to 1, got {margin:g}")
    if checked and form != "correlation":
        raise ValueError(f"margin: expected supervision='correlation' with it, got {supervision!r}")
    return Supervision(
        check.check_number(gradient_weight, "gradient_weight"),
        check.check_number(far_weight, "far_weight"),
        supervised_reference.WITHIN_CLASS if within_class else form,
        check.check_choice(relation, "relation", RELATIONS),
        checked,
    )


def supervised_evidential_loss(
    logits: Tensor,
    target: Tensor,
    image: Tensor | None,
    *,
    gradient: Tensor | None = None,
    distance: Tensor | None = None,
    band: Tensor | None = None,
    supervision: str = "covariance",
    within_class: bool = False,
    margin: float = 0.0,
    gradient_weight: float = 1.0,
    far_weight: float = 1.0,
    boundary: float = 1.0,
    near: float = 4.0,
    far: float = 4.0,
    relation: str = "decreasing",
    operator: str = "sobel",
    spacing: check.Numbers | None = None,
    padding_mode: str = "replicate",
    channel_reduction: str = "l2",
    kind: str = "digamma",
    evidence: str = "softplus",
    prior: check.Numbers = 1.0,
    ace_weight: float = 1.0,
    kl_weight: float = 1.0,
    dice_weight: float = 1.0,
    dice: str = "adaptive_tversky",
    class_weight: check.Numbers | None = None,
    include_background: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    process_group: Any | None = None,
    compat: str | None = None,
    return_terms: bool = False,
) -> Any:
    """Evidential loss and gradient-weighted uncertainty supervision in the same sweep.

    evidential_loss + gradient_weight * C + far_weight * F. By default C is the covariance form of the
    gradient-uncertainty loss, relu(Cov(u, g) / std(g)) over the boundary voxels of an image (vacuity u, gradient
    magnitude g), averaged over images; F the mean of u over voxels far from every boundary. Gradients flow to the
    logits alone.

    Args:
        logits, target: as `evidential_loss`, which also explains the arguments not named here.
        image: (N, M, *spatial), floating point; may be None where `gradient` is given.
        gradient: gradient magnitude (N, 1, *spatial) computed once; `image` is then not read.
        distance: boundary distance (N, 1, *spatial) computed once.
        band: `boundary_band` (N, 1, *spatial) computed once; goes before `distance`.
        supervision: `covariance`, `correlation` (divided by std(u) as well), or `exact`: the pairwise ranking over all
            pairs of an image's boundary voxels, `gradient_uncertainty_loss`, in place of C. It reads the logits once
            more, keeps a float32 map for backward, and on a GPU makes the host wait.
        within_class: compare only voxels of one label; for `exact`.
        margin: for `correlation`: C = relu(corr(u, g) + margin), which goes on until the correlation is -margin (for
            `increasing` +margin), 0 to 1. With 0 no more than the sign of the relation is asked for.
        boundary, near, far: distances that define the band, in the unit of `spacing`.
        relation: `decreasing` penalises uncertainty that rises with the gradient, `increasing` the opposite.
        operator, spacing, padding_mode, channel_reduction: as `gradient_magnitude`; `spacing` also serves the
            distance.

    Returns:
        0-d float32 (float64 for float64 logits), and SupervisedTerms(ace, kl, dice, gradient, far) with
        `return_terms`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also when `image`, `gradient`
            or `distance` require a gradient, which they cannot get.
    """
    values_read = check.values_read(logits)
    (z, labels, counted, source, given_band), (found, options, filter_, thresholds) = _checked_supervised(
        values_read,
        (logits, target, mask, image, gradient, band),
        supervision=supervision,
        within_class=within_class,
        margin=margin,
        gradient_weight=gradient_weight,
        far_weight=far_weight,
        boundary=boundary,
        near=near,
        far=far,
        relation=relation,
        operator=operator,
        spacing=spacing,
        padding_mode=padding_mode,
        channel_reduction=channel_reduction,
        kind=kind,
        evidence=evidence,
        prior=prior,
        ace_weight=ace_weight,
        kl_weight=kl_weight,
        dice_weight=dice_weight,
        dice=dice,
        class_weight=class_weight,
        include_background=include_background,
        ignore_index=ignore_index,
        process_group=process_group,
        compat=compat,
        return_terms=return_terms,
    )
    formula, weights, ignored = found
    backend = dispatch(z, "supervised_evidential_loss")
    common = _Common(z, labels, counted, ignored, formula, weights, backend, values_read)
    bands = _band_for(distance, common, thresholds, filter_.spacing) if given_band is None else given_band
    if common.backend == "reference":
        loss, stacked = _reference_supervised(common, source, filter_, bands, options, process_group)
    else:
        loss, stacked = SupervisedEvidentialLossFunction.apply(
            common.logits,
            common.target,
            source,
            bands,
            common.mask,
            common.ignore_index,
            common.formula,
            common.weights,
            options,
            filter_,
            process_group,
            common.backend,
        )
    _explain(loss, common, process_group, **{"gradient" if filter_.cached else "image": source})
    return (loss, SupervisedTerms(*stacked.unbind())) if return_terms else loss


def _gradient_source(
    image: Tensor | None,
    gradient: Tensor | None,
    logits: Tensor,
    operator: str,
    spacing: check.Numbers | None,
    padding_mode: str,
    channel_reduction: str,
) -> tuple[Tensor, Filter]:
    """The map that the gradient magnitude is read or made from, checked, and how."""
    n, _, *spatial = logits.shape
    options = check_filter(operator, spacing, padding_mode, channel_reduction, ndim=len(spatial))
    filter_ = Filter(*options[:-1], gradient is not None)
    name = "gradient" if gradient is not None else "image"
    given = gradient if gradient is not None else image
    if given is None:
        raise TypeError("image: expected a torch.Tensor (or a gradient magnitude as `gradient`), got None")
    source = check.check_float_map(given, name)
    check.check_same_device(source, name, logits, "logits")
    expected = (n, 1 if gradient is not None else source.shape[1], *spatial)
    if check.shape_of(source) != expected:
        raise ValueError(
            f"{name}: expected shape {(n, 1 if gradient is not None else 'M', *spatial)}, got {check.shape_of(source)}"
        )
    check.refuse_gradient(source, name)
    if image is not None and gradient is not None:
        check.refuse_gradient(image, "image")
    return source, filter_


def _check_supervised(
    tensors: tuple[Any, ...],
    supervision: str,
    within_class: bool,
    margin: float,
    gradient_weight: float,
    far_weight: float,
    boundary: float,
    near: float,
    far: float,
    relation: str,
    operator: str,
    spacing: check.Numbers | None,
    padding_mode: str,
    channel_reduction: str,
    **evidential: Any,
) -> check.Checked:
    """Logits, target, mask, what the gradient magnitude comes from and the band, if given; and what follows from the
    options: those of `_check_loss`, (Supervision, Filter, thresholds)."""
    logits, target, mask, image, gradient, band = tensors
    (z, labels, counted), found = _check_loss((logits, target, mask), **evidential)
    options = check_supervision(supervision, within_class, gradient_weight, far_weight, relation, margin)
    source, filter_ = _gradient_source(image, gradient, z, operator, spacing, padding_mode, channel_reduction)
    thresholds = check_thresholds(boundary, near, far)
    if band is not None:
        band = _check_band(band, z)
    return (z, labels, counted, source, band), (found, options, filter_, thresholds)


_checked_supervised = check.unless_alike(_check_supervised)


def _check_band(band: object, logits: Tensor) -> Tensor:
    """A `boundary_band` of the logits' images as (N, *spatial)."""
    checked = check.check_voxel_map(band, "band", logits.shape[0], logits.shape[2:], logits)
    if checked.dtype != torch.uint8:
        raise TypeError(f"band: expected uint8 as boundary_band returns, got {checked.dtype}")
    if check.values_checked(checked) and int(checked.max()) > FAR:
        raise ValueError(f"band: expected values 0 to {FAR}, got {int(checked.max())}")
    return checked


def _check_distance(distance: object, logits: Tensor) -> Tensor:
    """A `boundary_distance` of the logits' images as (N, *spatial), its values aside."""
    checked = check.check_voxel_map(distance, "distance", logits.shape[0], logits.shape[2:], logits)
    if not checked.is_floating_point():
        raise TypeError(f"distance: expected a floating-point map, got {checked.dtype}")
    check.refuse_gradient(checked, "distance")
    return checked


def check_supervision_maps(
    logits: Tensor,
    image: Tensor | None,
    gradient: Tensor | None,
    distance: Tensor | None,
    band: Tensor | None,
    *,
    operator: str,
    spacing: check.Numbers | None,
    padding_mode: str,
    channel_reduction: str,
) -> None:
    """What `supervised_evidential_loss` says of the maps that were given, without computing anything."""
    if image is not None or gradient is not None:
        _gradient_source(image, gradient, logits, operator, spacing, padding_mode, channel_reduction)
    if band is not None:
        _check_band(band, logits)
    elif distance is not None:
        _check_distance(distance, logits)


def _band_for(
    distance: Tensor | None, common: _Common, thresholds: tuple[float, float, float], spacing: tuple[float, ...]
) -> Tensor:
    """The band (N, *spatial) that follows from the distance or the labels."""
    if distance is None:
        return _band(common.target, thresholds, spacing, common.ignore_index, common.backend).squeeze(1)
    distances = _check_distance(distance, common.logits)
    check.check_distances(distances, counted_voxels(common.target, common.ignore_index, common.mask))
    return band_of(distances, *(reach(threshold) for threshold in thresholds))


def _reference_supervised(
    common: _Common,
    source: Tensor,
    filter_: Filter,
    bands: Tensor,
    options: Supervision,
    process_group: Any | None,
) -> tuple[Tensor, Tensor]:
    ace, kl, dice = _reference_terms(common, process_group)
    counted = counted_voxels(common.target, common.ignore_index, common.mask)
    z = torch.where(counted.unsqueeze(1), common.logits, 0.0)
    (u,) = dirichlet_reference.dirichlet_uncertainty(
        z, evidence=common.formula.evidence, prior=common.formula.prior, measures=("vacuity",)
    )
    g = source
    if not filter_.cached:
        g = gradient_reference.gradient_magnitude(
            source,
            operator=filter_.operator,
            spacing=filter_.spacing,
            padding_mode=filter_.padding_mode,
            channel_reduction=filter_.channel_reduction,
        )
    c, f = supervised_reference.supervision_terms(
        u.flatten(1),
        g.flatten(1),
        bands.flatten(1),
        counted.flatten(1),
        common.target.flatten(1),
        supervision=options.form,
        relation=options.relation,
        margin=options.margin,
        process_group=process_group,
    )
    w = common.weights
    loss = w.ace * ace + w.kl * kl + w.dice * dice + options.gradient_weight * c + options.far_weight * f
    return loss, torch.stack((ace, kl, dice, c, f)).detach()


def pairwise_ranking_loss(
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    relation: str = "decreasing",
    method: str = "exact",
    num_pairs: int | None = None,
    generator: torch.Generator | None = None,
    process_group: Any | None = None,
    compat: str | None = None,
) -> Tensor:
    """How far pairs of points break a relation between `values` and `scores` (Li et al., MICCAI 2025, over all pairs).

    R = sum over violating pairs of |x_i - x_j| |y_i - y_j| / their number, of each image, then the mean over all
    images; an image without a violating pair adds 0. A pair violates "decreasing" where the larger value has the
    larger score, "increasing" where it has the smaller; pairs tied in either never do. The gradient flows to `values`
    alone: scores are detached, and the number of pairs is a constant.

    Args:
        values: maps (N, 1, *spatial) or sets of points (N, n), floating point. Differentiable.
        scores: the same shape, floating point (float64 counts in full, whatever the dtype of values).
        mask: boolean (0/1 numbers accepted), True = counts; the shape of values, maps also (N, *spatial).
        groups: integers of the shape of mask, for example the label: only pairs within a group count, and a row's
            groups pool their pairs.
        relation: `decreasing` or `increasing`.
        method: `exact` takes all pairs, in O(n log n) time and O(n) memory; `sampled` draws `num_pairs` pairs of each
            image with replacement, as published; `covariance` is the one-pass relaxation relu(Cov(x, y) / std(y)),
            with moments about the means of the groups.
        num_pairs: of `sampled`: pairs drawn from each image, by default as many as it has points.
        generator: of `sampled`: source of the pairs; the same generator gives the same pairs.
        process_group: the mean is over the images of all ranks; gradients follow DistributedDataParallel's averaging.
            As pairs never cross images, nothing but one sum is exchanged.
        compat: "official" reproduces the published programs. `sampled` adds up the means of 20,000 pairs at a time,
            takes from each image at most what the one before it could give (all its pairs), and by default as many as
            the first image has points. `exact` is what that tends to: each image's mean times its number of chunks;
            with `groups` the sum over groups of their means, as PriUS has it.

    Returns:
        0-d float32, float64 for float64 values. On a GPU a mask or groups make the host wait, and float64 values, which
        no kernel takes, are added up by torch, whose sums there need not repeat to the bit.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    x = points.as_points(values, "values")
    if x.ndim == 1 or 0 in x.shape:
        raise ValueError(f"values: expected shape (N, n) or (N, 1, *spatial) without empty axes, got {tuple(x.shape)}")
    method_ = check_method(relation, method, num_pairs, generator, process_group, compat)
    y = points.match(points.as_points(scores, "scores"), "scores", x, "values")
    check.refuse_swapped(x, "values", y, "scores")
    counted = None if mask is None else points.match_boolean(mask, "mask", x, "values")
    group = None if groups is None else points.match_groups(groups, x, "values")
    return _ranking(points.rows(x), y, counted, group, method_, generator, process_group)


def check_method(
    relation: str,
    method: str,
    num_pairs: int | None,
    generator: torch.Generator | None = None,
    process_group: Any | None = None,
    compat: str | None = None,
) -> Method:
    """The options of `pairwise_ranking_loss`."""
    checked = Method(
        check.check_choice(relation, "relation", RELATIONS),
        check.check_choice(method, "method", RANKINGS),
        None if num_pairs is None else check.check_count(num_pairs, "num_pairs", maximum=MOST_PAIRS),
        check.check_compat(compat),
    )
    check.check_process_group(process_group)
    if checked.official and checked.name == "covariance":
        raise ValueError("compat: expected None for method='covariance', which was not published, got 'official'")
    _check_generator(generator)
    return checked


def _ranking(
    values: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    groups: Tensor | None,
    method: Method,
    generator: torch.Generator | None,
    process_group: Any | None,
    names: tuple[str, str] = ("values", "scores"),
) -> Tensor:
    """`pairwise_ranking_loss` of checked rows (N, n), which the caller knows by their `names`."""
    backend = get_backend(values, "pairwise_ranking_loss")
    if backend == "reference" and method.name != "sampled" and not method.official:
        loss = ranking_reference.pairwise_ranking(
            values, scores, mask, groups, relation=method.relation, method=method.name, process_group=process_group
        )
    else:
        loss = PairwiseRankingFunction.apply(
            values, scores.detach(), mask, groups, method, generator, process_group, backend
        )
    if check.values_checked(values) and not math.isfinite(loss.item()):
        for name, tensor in zip(names, (values, scores), strict=True):
            bad = ~torch.isfinite(tensor) if mask is None else ~torch.isfinite(tensor) & mask
            if bool(bad.any()):
                raise ValueError(
                    f"{name}: expected finite numbers at counted points, got {int(bad.sum())} that are not"
                )
    return loss


def gradient_uncertainty_loss(
    uncertainty: Tensor,
    gradient: Tensor,
    distance: Tensor,
    *,
    max_distance: float = 1.0,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    relation: str = "decreasing",
    method: str = "exact",
    num_pairs: int | None = None,
    generator: torch.Generator | None = None,
    soft: SoftThresholds | None = None,
    pairs: Tensor | None = None,
    process_group: Any | None = None,
    compat: str | None = None,
) -> Tensor:
    """L_gu: on a boundary, the stronger the image gradient, the lower the uncertainty (Li et al., MICCAI 2025).

    `pairwise_ranking_loss` of the uncertainty against the gradient magnitude over voxels with
    distance <= max_distance; see there for the arguments not named here.

    Args:
        uncertainty: (N, 1, *spatial), floating point, for example the vacuity. Differentiable.
        gradient: gradient magnitude of the image, (N, 1, *spatial) or (N, *spatial); detached.
        distance: `boundary_distance`, (N, 1, *spatial) or (N, *spatial).
        max_distance: voxels at most so far from a boundary are on it.
        groups: the label, to compare voxels only within a class (PriUS).
        soft: PriUS's sigmoid form (arXiv 2605.10984): means of u and maxima of g over `normal_kernel` voxels, compared
            in random pairs, each weighted by how surely both voxels are on the boundary, over the sum of the weights.
            `max_distance` and `method` then do not apply. The form over all pairs in O(n log n) is the one without it.
        pairs: of `soft`: (P, 2) integers, positions in the map flattened with its batch. By default each voxel is drawn
            once, or `num_pairs` pairs of each image, those on the boundary first; with compat="official" across images,
            and the windows count the zeros around an image.

    Returns:
        0-d float32, float64 for a float64 uncertainty.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    u = _uncertainty_map(uncertainty, "uncertainty")
    g = _like_uncertainty(gradient, "gradient", u)
    check.refuse_swapped(u, "uncertainty", gradient, "gradient")
    method_ = check_method(relation, method, num_pairs, generator, process_group, compat)
    max_distance = check.check_number(max_distance, "max_distance", largest=check.FLOAT64_MAX)
    if soft is not None:
        inputs = _soft_inputs(u, "uncertainty", distance, soft, groups, mask, compat, "gradient_uncertainty_loss")
        on_boundary = soft_reference.boundary_weight(inputs.distance, soft) > soft_reference.NEGLIGIBLE
        chosen = _soft_pairs(pairs, inputs, num_pairs, generator, on_boundary)
        loss = inputs.module.soft_gradient_loss(
            inputs.u, g.view_as(u), inputs.distance, chosen, soft,
            relation=relation, process_group=process_group, **inputs.options,
        )  # fmt: skip
        _explain_maps(loss, {"uncertainty": u}, inputs.options["counted"])
        _explain_maps(loss, {"gradient": g.view_as(u)}, None)
        return loss
    _refuse_pairs(pairs)
    counted = None if mask is None else points.match_boolean(mask, "mask", u, "uncertainty")
    near = _distances(distance, u, counted) <= max_distance
    if counted is not None:
        near = near & counted
    group = None if groups is None else points.match_groups(groups, u, "uncertainty")
    names = "uncertainty", "gradient"
    return _ranking(points.rows(u), g, near, group, method_, generator, process_group, names)


def _uncertainty_map(value: object, name: str) -> Tensor:
    """A floating-point map (N, 1, *spatial)."""
    tensor = check.check_float_map(value, name)
    if tensor.shape[1] != 1:
        raise ValueError(f"{name}: expected shape (N, 1, *spatial), got {check.shape_of(tensor)}")
    return tensor


def _like_uncertainty(value: object, name: str, uncertainty: Tensor) -> Tensor:
    """A detached floating-point map, (N, 1, *spatial) or (N, *spatial) like the uncertainty's, as rows (N, V)."""
    rows = points.match(value, name, uncertainty, "uncertainty").detach()
    if not rows.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point map, got {rows.dtype}")
    return rows


def _distances(distance: object, like: Tensor, counted: Tensor | None) -> Tensor:
    """`distance` as rows (N, V), none of those that are `counted` negative."""
    rows = _like_uncertainty(distance, "distance", like)
    check.check_distances(rows, counted)
    return rows


class _SoftInputs(NamedTuple):
    """Checked arguments of the soft losses: maps (N, 1, *spatial), what counts, and which module computes."""

    u: Tensor
    distance: Tensor
    options: dict[str, Any]
    module: ModuleType


def _soft_inputs(
    u: Tensor,
    name: str,
    distance: Tensor,
    soft: SoftThresholds,
    groups: Tensor | None,
    mask: Tensor | None,
    compat: str | None,
    op: str,
) -> _SoftInputs:
    check_soft(soft)
    work = u.to(working_dtype(u.dtype))
    counted = None if mask is None else points.match_boolean(mask, "mask", u, name).view_as(u)
    d = _distances(distance, u, counted).to(work.dtype).view_as(u)
    options = {
        "groups": None if groups is None else points.match_groups(groups, u, name).view_as(u),
        "counted": counted,
        "official": check.check_compat(compat),
    }
    reference = get_backend(u, f"{op} with soft thresholds") == "reference"
    return _SoftInputs(work, d, options, soft_reference if reference else soft_op)


def check_soft(soft: SoftThresholds | None) -> None:
    if soft is None:
        return
    if not isinstance(soft, SoftThresholds):
        raise TypeError(f"soft: expected SoftThresholds, got {type(soft).__name__}")
    for name, value in zip(SoftThresholds._fields, soft, strict=True):
        if name.endswith("kernel"):
            if check.check_count(value, f"soft.{name}", maximum=WIDEST_WINDOW) % 2 == 0:
                raise ValueError(f"soft.{name}: expected an odd number, got {value}")
        else:
            check.check_number(value, f"soft.{name}", exclusive=name == "alpha")


def _refuse_pairs(pairs: Tensor | None) -> None:
    if pairs is not None:
        raise ValueError("pairs: expected None without soft thresholds, whose pairs they are")


def _soft_pairs(
    pairs: Tensor | None,
    inputs: _SoftInputs,
    num_pairs: int | None,
    generator: torch.Generator | None,
    wanted: Tensor | None = None,
) -> Tensor:
    """The pairs (P, 2) that were handed in, checked, or else drawn; voxels that are `wanted` are paired first."""
    u, counted = inputs.u, inputs.options["counted"]
    if pairs is None:
        if counted is not None:
            wanted = counted if wanted is None else wanted & counted
        return soft_op.draw_pairs(u, wanted, num_pairs, generator, across=inputs.options["official"])
    given = check.plain_tensor(pairs, "pairs")
    check.check_same_device(given, "pairs", u, "the map they belong to")
    if given.dtype not in check.INT_DTYPES:
        raise TypeError(f"pairs: expected integers, got {given.dtype}")
    if given.ndim != 2 or given.shape[1] != 2:
        raise ValueError(f"pairs: expected shape (P, 2), got {check.shape_of(given)}")
    given = check.torch_integer(given, "pairs").long()
    if check.values_checked(given) and given.numel() and not 0 <= int(given.min()) <= int(given.max()) < u.numel():
        found = f"{int(given.min())} to {int(given.max())}"
        raise ValueError(f"pairs: expected positions in [0, {u.numel() - 1}], got {found}")
    return given


def noise_uncertainty_loss(
    clean: Tensor,
    noisy: Sequence[Tensor] | Tensor,
    levels: Sequence[float | Tensor] | Tensor,
    distance: Tensor,
    *,
    points: Tensor | None = None,
    near: float = 4.0,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    soft: SoftThresholds | None = None,
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    pairs: Tensor | None = None,
    num_pairs: int | None = None,
    generator: torch.Generator | None = None,
    process_group: Any | None = None,
    compat: str | None = None,
    return_terms: bool = False,
) -> Any:
    """L_nu: near a boundary, more noise means more uncertainty; far from every boundary there is none (Li et al.,
    MICCAI 2025).

    weights[0] L_mu + weights[1] L_d + weights[2] L_far, of the uncertainty u_0 of a clean image and u_1, ..., u_L of
    the same image under noise of levels m_1, ..., m_L (m_0 = 0):

        L_mu  = sum of V(-(u_l - u_k)(m_l - m_k)), V(x) = sum relu(x) / #{x > 0}, over pairs (l, k) of every map with
                the clean one and with its predecessor; all images pooled
        L_d   = sum over l of R(u_l - u_0, d), `pairwise_ranking_loss` over all pairs: the rise falls with distance d
        L_far = mean of u_0 + ... + u_L over voxels with d > near; 0 where there is none (the published 0 / 0 is NaN)

    L_mu and L_d are over voxels with d <= near, or over those of the `points` that are. The clean map is detached in
    both, not in L_far, as the published training does it.

    Args:
        clean: u_0, (N, 1, *spatial), floating point. Differentiable.
        noisy: u_1, ..., u_L, one or more maps of the same shape and dtype (a sequence, or stacked along a first axis).
            Differentiable.
        levels: m_1, ..., m_L: finite numbers, or tensors () or (N,); (L,) and (L, N) tensors are read likewise.
        distance: `boundary_distance`, (N, 1, *spatial) or (N, *spatial); read in the precision of the arithmetic.
        points: (N, P, ndim) integer coordinates in array-axis order, as `sample_noise_patches` returns; -1 is none.
        near: voxels at most so far from a boundary are near it, all others far.
        weights: of L_mu, L_d and L_far, each >= 0. L_d is not computed where its weight is 0 and no term is asked for.
        soft: PriUS's sigmoid form (arXiv 2605.10984) in place of `near`: L_mu over means in windows of `patch_kernel`
            voxels, each map with its (detached) predecessor, voxels weighted; L_d and L_far in one hinge over random
            pairs of voxels of one group, the mean over all maps. Its two terms are the shares of the slopes; they
            depend on weights[1] and weights[2] also through the hinge. It has no Triton kernels. All pairs can be
            handed in for small maps; the hinge couples u, d and the weights, so that no sum over all of them in
            O(n log n) is known, while the form without `soft` has one.
        groups: integers (N, 1, *spatial) or (N, *spatial), the label: L_d compares voxels within a group alone.
        mask: voxels that count.
        pairs, num_pairs, generator: of `soft`, as in `gradient_uncertainty_loss`.
        process_group: sums run over its ranks; gradients follow DistributedDataParallel's averaging.
        compat: "official" reproduces the published functions: gradients reach the clean map through every term, and
            L_d keeps points that are farther than `near` or masked as differences of 0, which pair with the others.
            With `soft`: windows count the zeros around an image, pairs cross images.
        return_terms: also return NoiseTerms(mu, d, far), unweighted and detached.

    Returns:
        0-d float32 (float64 for float64 maps).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    maps = _noise_maps(clean, noisy)
    m = _noise_levels(levels, maps)
    near, w = check_noise(near, weights, num_pairs, process_group, compat, return_terms)
    _check_generator(generator)
    wanted = return_terms or w[1] > 0
    if soft is None:
        _refuse_pairs(pairs)
        loss, terms = _hard_noise(maps, m, distance, points, near, w, groups, mask, process_group, compat, wanted)
    elif points is not None:
        raise ValueError("points: expected None with soft thresholds, which weight all voxels")
    else:
        inputs = _soft_inputs(maps[0], "clean", distance, soft, groups, mask, compat, "noise_uncertainty_loss")
        wanted = wanted or w[2] > 0
        chosen = _soft_pairs(pairs, inputs, num_pairs, generator) if wanted else None
        loss, terms = _soft_noise(maps, m, inputs, chosen, soft, w, process_group)
    return (loss, terms) if return_terms else loss


def check_noise(
    near: float,
    weights: Sequence[float],
    num_pairs: int | None,
    process_group: Any | None,
    compat: str | None,
    return_terms: bool,
    name: str = "weights",
) -> tuple[float, tuple[float, ...]]:
    """The options of `noise_uncertainty_loss`: `near` and the weights, which the caller knows by `name`."""
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{name}: expected 3 numbers, of L_mu, L_d and L_far, got {type(weights).__name__}")
    if len(weights) != 3:
        raise ValueError(f"{name}: expected 3 numbers, of L_mu, L_d and L_far, got {weights!r}")
    if num_pairs is not None:
        check.check_count(num_pairs, "num_pairs", maximum=MOST_PAIRS)
    check.check_process_group(process_group)
    check.check_compat(compat)
    check.check_bool(return_terms, "return_terms")
    return check.check_number(near, "near", largest=check.FLOAT64_MAX), tuple(
        check.check_number(value, f"{name}[{i}]") for i, value in enumerate(weights)
    )


def _noise_maps(clean: Tensor, noisy: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """u_0, u_1, ..., all (N, 1, *spatial)."""
    maps = [_uncertainty_map(clean, "clean")]
    check.check_sequence(noisy, "noisy", "maps")
    if len(noisy) == 0:
        raise ValueError("noisy: expected one or more maps, got none")
    return maps + [_like_clean(u, f"noisy[{i}]", maps[0]) for i, u in enumerate(noisy)]


def _like_clean(value: object, name: str, clean: Tensor) -> Tensor:
    """An uncertainty map like the clean one's."""
    u = _uncertainty_map(value, name)
    check.check_same_device(u, name, clean, "clean")
    if u.shape != clean.shape:
        raise ValueError(f"{name}: expected shape {check.shape_of(clean)} like clean, got {check.shape_of(u)}")
    if u.dtype != clean.dtype:
        raise TypeError(f"{name}: expected {clean.dtype} like clean, got {u.dtype}")
    return u


def _noise_levels(levels: Sequence[float | Tensor] | Tensor, maps: list[Tensor]) -> Tensor:
    """(L + 1, N) in the working dtype, the clean map's zeros first."""
    check.check_sequence(levels, "levels", "numbers, one per noisy map")
    if len(levels) != len(maps) - 1:
        raise ValueError(f"levels: expected {len(maps) - 1} numbers, one per noisy map, got {len(levels)}")
    n, dtype, device = len(maps[0]), working_dtype(maps[0].dtype), maps[0].device
    rows = [torch.zeros(n, dtype=dtype, device=device)]
    for i, level in enumerate(levels):
        if not isinstance(level, Tensor):
            number = check.check_number(level, f"levels[{i}]", minimum=-math.inf)
            rows.append(torch.full((n,), number, dtype=dtype, device=device))
            continue
        check.check_same_device(level, f"levels[{i}]", maps[0], "clean")
        check.refuse_gradient(level, f"levels[{i}]")
        if level.dtype not in (*check.FLOAT_DTYPES, *check.INT_DTYPES):
            raise TypeError(f"levels[{i}]: expected real numbers, got {level.dtype}")
        if level.shape not in ((), (n,)):
            raise ValueError(f"levels[{i}]: expected a number or shape {(n,)}, got {check.shape_of(level)}")
        if check.values_checked(level) and not bool(torch.isfinite(level).all()):
            raise ValueError(f"levels[{i}]: expected finite numbers, got {level.tolist()}")
        rows.append(level.to(dtype).expand(n))
    return torch.stack(rows)


def _point_index(given: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(N, P): positions of the points in the flattened map, and whether there is one."""
    tensor = check.plain_tensor(given, "points")
    check.check_same_device(tensor, "points", like, "clean")
    n, _, *spatial = like.shape
    if tensor.dtype not in check.INT_DTYPES:
        raise TypeError(f"points: expected integer coordinates, got {tensor.dtype}")
    if tensor.ndim != 3 or tensor.shape[0] != n or tensor.shape[2] != len(spatial) or tensor.shape[1] == 0:
        raise ValueError(f"points: expected shape {(n, 'P', len(spatial))}, got {check.shape_of(tensor)}")
    coordinates = check.torch_integer(tensor, "points").long()
    index = torch.zeros_like(coordinates[..., 0])
    listed = torch.ones_like(index, dtype=torch.bool)
    for axis, size in enumerate(spatial):
        c = coordinates[..., axis]
        # One outside the image is an error below; where that is not looked at, it is none, and reads within bounds.
        listed = listed & (c >= 0) & (c < size)
        index = index * size + c.clamp(0, size - 1)
        if check.values_checked(c) and not -1 <= int(c.min()) <= int(c.max()) < size:
            found = f"{int(c.min())} to {int(c.max())}"
            raise ValueError(f"points: expected coordinates in [0, {size - 1}] along axis {axis}, or -1, got {found}")
    return index, listed


def _hard_noise(
    maps: list[Tensor],
    levels: Tensor,
    distance: Tensor,
    at: Tensor | None,
    near: float,
    weights: tuple[float, ...],
    groups: Tensor | None,
    mask: Tensor | None,
    process_group: Any | None,
    compat: str | None,
    ranked: bool,
) -> tuple[Tensor, NoiseTerms]:
    """`noise_uncertainty_loss` by thresholds; L_d is computed where it is `ranked`."""
    official = check.check_compat(compat)
    u = [x.flatten(1) for x in maps]
    counted = None if mask is None else points.match_boolean(mask, "mask", maps[0], "clean")
    d = _distances(distance, maps[0], counted).to(levels.dtype)
    group = None if groups is None else points.match_groups(groups, maps[0], "clean")
    index, listed, where, chosen = None, None, d, counted
    if at is not None:
        index, listed = _point_index(at, maps[0])
        where = d.gather(1, index)
        chosen = listed if counted is None else listed & counted.gather(1, index)
        group = None if group is None else group.gather(1, index)
    backend = get_backend(maps[0], "noise_uncertainty_loss")
    if backend == "reference":
        everywhere = torch.ones_like(d, dtype=torch.bool) if counted is None else counted
        values = u if index is None else [x.gather(1, index) for x in u]
        on = everywhere if chosen is None else chosen
        mu = noise_reference.rising_term(
            values, levels, where, on, near=near, official=official, process_group=process_group
        )
        far = noise_reference.far_term(u, d, everywhere, near=near, process_group=process_group)
        loss = weights[0] * mu + weights[2] * far
    else:
        loss, stacked, at_points = NoiseUncertaintyFunction.apply(
            levels,
            d,
            counted,
            index,
            None if index is None else chosen,
            near,
            (weights[0], weights[2]),
            official,
            process_group,
            backend,
            *u,
        )
        mu, far = stacked.unbind()
        values = u if index is None else list(at_points.unbind())
    _explain_maps(loss, _noise_names(maps), counted)
    rank = torch.zeros_like(mu)
    if ranked:
        with contextlib.nullcontext() if weights[1] > 0 else torch.no_grad():
            rank = _rise_by_distance(values, where, chosen, listed, group, near, official, process_group)
        loss = loss + weights[1] * rank
    return loss, NoiseTerms(mu.detach(), rank.detach(), far.detach())


def _noise_names(maps: list[Tensor]) -> dict[str, Tensor]:
    return {f"noisy[{i - 1}]" if i else "clean": u for i, u in enumerate(maps)}


def _explain_maps(loss: Tensor, maps: dict[str, Tensor], counted: Tensor | None) -> None:
    """Name the map and voxel when the loss is not finite because a map was not."""
    if check.values_checked(loss) and not math.isfinite(loss.item()):
        for name, u in maps.items():
            valid = torch.ones_like(u[:, 0], dtype=torch.bool) if counted is None else counted.view_as(u[:, 0])
            check.explain_non_finite(u, valid, name)


def _rise_by_distance(
    values: list[Tensor],
    d: Tensor,
    chosen: Tensor | None,
    listed: Tensor | None,
    groups: Tensor | None,
    near: float,
    official: bool,
    process_group: Any | None,
) -> Tensor:
    """L_d of values (N, n): those `chosen` that are near, or `official`ly all that are `listed`, the others as 0."""
    on = d <= near if chosen is None else chosen & (d <= near)
    clean, *noisy = (u.to(d.dtype) for u in values)
    mask = on
    if official:
        mask = torch.isfinite(d) if listed is None else listed & torch.isfinite(d)
    else:
        clean = clean.detach()
    total = []
    for u in noisy:
        rise = torch.where(on, u - clean, 0.0) if official else u - clean
        total.append(_ranking(rise, d, mask, groups, Method("decreasing", "exact", None, False), None, process_group))
    return torch.stack(total).sum()


def _soft_noise(
    maps: list[Tensor],
    levels: Tensor,
    inputs: _SoftInputs,
    pairs: Tensor | None,
    soft: SoftThresholds,
    weights: tuple[float, ...],
    process_group: Any | None,
) -> tuple[Tensor, NoiseTerms]:
    """`noise_uncertainty_loss` by sigmoids; without `pairs` of L_mu alone."""
    counted, official = inputs.options["counted"], inputs.options["official"]
    u = [x.to(levels.dtype) for x in maps]
    mu = inputs.module.soft_noise_loss(
        u, levels, inputs.distance, soft, counted=counted, official=official, process_group=process_group
    )
    loss, shares = weights[0] * mu, torch.zeros(2, dtype=mu.dtype, device=mu.device)
    if pairs is not None:
        terms = soft_reference.distance_pairs(inputs.distance, pairs, soft, **inputs.options)
        for x in u:
            x = x if counted is None else torch.where(counted, x, 0.0)
            hinge, share = inputs.module.pair_loss(x, pairs, terms, weights[1:], process_group)
            loss, shares = loss + hinge / len(u), shares + share / len(u)
    _explain_maps(loss, _noise_names(maps), counted)
    return loss, NoiseTerms(mu.detach(), *shares.unbind())


def hard_sample_mask(clean: Tensor, noised: Tensor) -> Tensor:
    """Voxels at which a network is wrong about noise: their uncertainty did not rise (Li et al., MICCAI 2025).

    Args:
        clean: uncertainty of an image, (N, 1, *spatial), floating point.
        noised: its uncertainty under `add_gaussian_noise`, the same shape.

    Returns:
        Boolean (N, 1, *spatial): noised <= clean. Not differentiable; False where either is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    u = _uncertainty_map(clean, "clean")
    return patches_reference.hard_sample_mask(u, _like_clean(noised, "noised", u))


def add_gaussian_noise(
    image: Tensor, *, mean: float = 0.5, std: float = 0.3, generator: torch.Generator | None = None
) -> Tensor:
    """`image` (N, M, *spatial) plus noise of its own in every voxel and channel, as a new tensor of the same dtype.

    The defaults are those of SURE's hard-sample detection, for images of mean 0 and standard deviation 1. A generator
    on another device gives the same noise here as there, at the price of a copy.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    x = check.check_float_map(image, "image")
    mean = check.check_number(mean, "mean", minimum=-math.inf)
    std = check.check_number(std, "std")
    _check_generator(generator)
    return x + (mean + std * normal(x.shape, x.device, generator)).to(x.dtype)


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def sample_noise_patches(
    image: Tensor,
    target: Tensor,
    distance: Tensor,
    hard: Tensor,
    *,
    patch_size: int = 3,
    patches_per_class: int = 3,
    mean_range: Sequence[float] = (0.0, 1.0),
    std: float = 0.3,
    near: float = 4.0,
    num_classes: int | None = None,
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> NoisePatches:
    """Noise of two means in small patches around hard voxels, for `noise_uncertainty_loss` (Li et al., MICCAI 2025).

    In each image and for each class `patches_per_class` centres are drawn among the hard voxels of the class, the
    background's (class 0) only up to distance `near`; patches lie in the image and do not overlap. What a class lacks
    is then filled with patches anywhere. Where even that finds no room, the centre is -1: never an error, never a
    longer search. Each patch, voxel and channel has noise of its own, and so have the two images.

    A step of active noise, with u(image) the uncertainty that a network gives:

        with torch.no_grad():
            hard = hard_sample_mask(u(image), u(add_gaussian_noise(image)))
        noise = sample_noise_patches(image, target, distance, hard, num_classes=K)
        noisy = [u(x) for x in noise.images]
        loss = noise_uncertainty_loss(u(image), noisy, noise.means, distance, points=noise.centres)

    Args:
        image: (N, M, *spatial), floating point. Left as it is.
        target: index map (N, *spatial) or (N, 1, *spatial), or one-hot (N, K, *spatial) where `num_classes` is K.
        distance: `boundary_distance`, (N, 1, *spatial) or (N, *spatial).
        hard: `hard_sample_mask`, boolean or 0/1, (N, 1, *spatial) or (N, *spatial).
        patch_size: width of a patch, odd, at most the image's.
        mean_range: m1 and m2 are uniform in it, the same for all images.
        std: standard deviation of the noise.
        near: largest distance of a background centre.
        num_classes: K. Without it, it is the largest label plus one, for which the host waits for the device.
        ignore_index: label of voxels that belong to no class.
        generator: source of all that is random; the same one gives the same result. It may be on another device.

    Returns:
        NoisePatches(images, means, centres): two images, (2,), and (N, K * patches_per_class, ndim) in order of class.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also when the image requires a
            gradient, which it cannot get.
    """
    x = check.check_float_map(image, "image")
    check.refuse_gradient(x, "image")
    n, m, *spatial = x.shape
    size = check.check_count(patch_size, "patch_size")
    number = check.check_count(patches_per_class, "patches_per_class", maximum=MOST_PATCHES)
    if size % 2 == 0 or size > min(spatial):
        raise ValueError(f"patch_size: expected an odd number of at most {min(spatial)}, got {size}")
    low, high = check.number_tuple(mean_range, "mean_range", 2, "end")
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"mean_range: expected two finite numbers in order, got {(low, high)}")
    std = check.check_number(std, "std")
    near = check.check_number(near, "near", largest=check.FLOAT64_MAX)
    ignore_index = check.check_int(ignore_index, "ignore_index")
    _check_generator(generator)
    labels, k = _classes_of(target, x, num_classes, ignore_index)
    if k * number > MOST_PATCHES:
        raise ValueError(
            f"{'target' if num_classes is None else 'num_classes'}: expected at most {MOST_PATCHES // number} classes "
            f"with {number} patches each, got {k}"
        )
    is_hard = points.match_boolean(hard, "hard", x[:, :1], "image").view_as(labels)
    counted = counted_voxels(labels, ignore_index)
    is_near = (_distances(distance, x[:, :1], counted) <= near).view_as(labels)
    candidates = is_hard & ((labels != 0) | is_near) & counted

    means = low + (high - low) * uniform((2,), x.device, generator)
    priority = uniform((n, *spatial), x.device, generator)
    # No kernels to insist on: only the reference is another implementation.
    ops = patches_reference if requested() == "reference" else patches_op
    centres = ops.patch_centres(priority, labels, candidates, k, number, size)
    shape = (n, m, centres.shape[1], size ** len(spatial))
    first, second = (
        ops.add_patches(x, centres, mean + std * normal(shape, x.device, generator), size) for mean in means
    )
    return NoisePatches((first, second), means, centres)


def _classes_of(target: Tensor, image: Tensor, num_classes: int | None, ignore_index: int) -> tuple[Tensor, int]:
    """Labels (N, *spatial) and the number of classes."""
    n, _, *spatial = image.shape
    if num_classes is not None:
        k = check.check_count(num_classes, "num_classes", minimum=2, maximum=MOST_PATCHES)
        like = image[:, :1].detach().expand(n, k, *spatial)
        return check.check_target(target, like, ignore_index, owner="image"), k
    labels = points.match(target, "target", image[:, :1], "image").view(n, *spatial)
    if labels.dtype not in check.INT_DTYPES:
        raise TypeError(f"target: expected integer labels of shape {(n, *spatial)}, got {labels.dtype}")
    labels = check.torch_integer(labels, "target")
    present = torch.where(counted_voxels(labels, ignore_index), labels, 0)
    if check.values_checked(labels) and int(present.min()) < 0:
        raise ValueError(f"target: expected labels from 0 or ignore_index={ignore_index}, got {int(present.min())}")
    return labels, int(present.max()) + 1
