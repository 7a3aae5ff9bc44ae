"""nn.Module wrappers: options in the constructor, tensors in the call, nothing learned.

Losses are called as MONAI and nnU-Net call theirs, `loss(input, target)`; whatever else they need is keyword. Priors,
class weights and spacings, lists and tensors included, are read when a module is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sure_kernels import functional, schedules
from sure_kernels.kernel_lib.labels import counted_voxels
from sure_kernels.validation import (
    FLOAT64_MAX,
    Numbers,
    check_bool,
    check_float_map,
    check_logits,
    check_mask,
    check_number,
    check_same_device,
    check_sequence,
    check_target,
    plain_tensor,
    settled,
    shape_of,
)


def _settled(options: dict[str, Any]) -> dict[str, Any]:
    """With numbers in sequences and tensors read once: in every call, a tensor on a GPU would make the host wait."""
    numbers = {name: settled(options[name], name) for name in ("prior", "class_weight", "spacing") if name in options}
    return options | numbers


class _Options(nn.Module):
    """Keeps keyword arguments for the function it wraps, which `check` refuses where they are wrong, and shows them."""

    def __init__(self, check: Callable[..., Any] | None = None, /, **options: Any) -> None:
        if check is not None:
            check(**options)
        super().__init__()
        self.options = _settled(options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class GradientMagnitude(_Options):
    """`sure_kernels.gradient_magnitude` as a module: image (N, M, *spatial) -> (N, 1, *spatial)."""

    def __init__(
        self,
        *,
        operator: str = "sobel",
        spacing: Numbers | None = None,
        padding_mode: str = "replicate",
        channel_reduction: str = "l2",
        eps: float = 0.0,
    ) -> None:
        super().__init__(
            functional.check_filter,
            operator=operator,
            spacing=spacing,
            padding_mode=padding_mode,
            channel_reduction=channel_reduction,
            eps=eps,
        )

    def forward(self, image: Tensor) -> Tensor:
        return functional.gradient_magnitude(image, **self.options)


class DirichletUncertainty(_Options):
    """`sure_kernels.dirichlet_uncertainty` as a module: logits (N, K, *spatial) -> a NamedTuple of measures."""

    def __init__(
        self,
        *,
        evidence: str = "softplus",
        prior: Numbers = 1.0,
        measures: tuple[str, ...] = ("probability", "vacuity"),
    ) -> None:
        super().__init__(functional.check_dirichlet, evidence=evidence, prior=prior, measures=measures)

    def forward(self, logits: Tensor) -> Any:
        return functional.dirichlet_uncertainty(logits, **self.options)


class EvidentialLoss(_Options):
    """`sure_kernels.evidential_loss` as a module; see there for the arguments.

    forward(input, target, *, mask=None) takes logits (N, K, *spatial) and an index map or one-hot target.
    """

    def __init__(
        self,
        *,
        kind: str = "digamma",
        evidence: str = "softplus",
        prior: Numbers = 1.0,
        ace_weight: float = 1.0,
        kl_weight: float = 1.0,
        dice_weight: float = 1.0,
        dice: str = "adaptive_tversky",
        class_weight: Numbers | None = None,
        include_background: bool = True,
        ignore_index: int = -100,
        process_group: Any | None = None,
        compat: str | None = None,
        return_terms: bool = False,
    ) -> None:
        super().__init__(
            functional.check_evidential,
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

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Any:
        return functional.evidential_loss(input, target, mask=mask, **self.options)


class GradientUncertaintyLoss(_Options):
    """`sure_kernels.gradient_uncertainty_loss` as a module; see there for the arguments.

    forward(uncertainty, gradient, distance, *, mask=None, groups=None, pairs=None, generator=None) takes maps
    (N, 1, *spatial).
    """

    def __init__(
        self,
        *,
        max_distance: float = 1.0,
        relation: str = "decreasing",
        method: str = "exact",
        num_pairs: int | None = None,
        soft: functional.SoftThresholds | None = None,
        process_group: Any | None = None,
        compat: str | None = None,
    ) -> None:
        check_number(max_distance, "max_distance", largest=FLOAT64_MAX)
        functional.check_method(relation, method, num_pairs, process_group=process_group, compat=compat)
        functional.check_soft(soft)
        super().__init__(
            max_distance=max_distance,
            relation=relation,
            method=method,
            num_pairs=num_pairs,
            soft=soft,
            process_group=process_group,
            compat=compat,
        )

    def forward(
        self,
        uncertainty: Tensor,
        gradient: Tensor,
        distance: Tensor,
        *,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        pairs: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return functional.gradient_uncertainty_loss(
            uncertainty,
            gradient,
            distance,
            mask=mask,
            groups=groups,
            pairs=pairs,
            generator=generator,
            **self.options,
        )


class NoiseUncertaintyLoss(_Options):
    """`sure_kernels.noise_uncertainty_loss` as a module; see there for the arguments.

    forward(clean, noisy, levels, distance, *, points=None, groups=None, mask=None, pairs=None, generator=None) takes
    uncertainty maps (N, 1, *spatial), the levels of the noisy ones and the distance to the boundary.
    """

    def __init__(
        self,
        *,
        near: float = 4.0,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        soft: functional.SoftThresholds | None = None,
        num_pairs: int | None = None,
        process_group: Any | None = None,
        compat: str | None = None,
        return_terms: bool = False,
    ) -> None:
        functional.check_noise(near, weights, num_pairs, process_group, compat, return_terms)
        functional.check_soft(soft)
        super().__init__(
            near=near,
            weights=weights,
            soft=soft,
            num_pairs=num_pairs,
            process_group=process_group,
            compat=compat,
            return_terms=return_terms,
        )

    def forward(
        self,
        clean: Tensor,
        noisy: Sequence[Tensor] | Tensor,
        levels: Sequence[float | Tensor] | Tensor,
        distance: Tensor,
        *,
        points: Tensor | None = None,
        groups: Tensor | None = None,
        mask: Tensor | None = None,
        pairs: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        return functional.noise_uncertainty_loss(
            clean,
            noisy,
            levels,
            distance,
            points=points,
            groups=groups,
            mask=mask,
            pairs=pairs,
            generator=generator,
            **self.options,
        )


class SURETerms(NamedTuple):
    """Unweighted, detached terms of `SURELoss`: 0-d tensors, 0 where a term was not computed.

    `far` is F, or with noised logits the L_far of `noise_uncertainty_loss`, the sum over all maps.
    """

    ace: Tensor
    kl: Tensor
    dice: Tensor
    gradient: Tensor
    far: Tensor
    mu: Tensor
    d: Tensor


class SURELoss(nn.Module):
    """The training objective of SURE: evidential segmentation loss and supervised uncertainty, with their schedules.

        L = w_ace ACE + lambda(t) w_kl KL + w_dice (1 - Dice) + annealing(t) (beta L_gu + gamma L_nu)

    with lambda(t) = min(1, t / annealing_steps) and annealing(t) rising from 0.01 at epoch `good_model_step` to 1 at
    `num_epochs`, 0 before. `set_epoch(t)` drives both; the epoch is part of the state_dict. L_nu needs the network's
    answers to noised images; in steps without them w_far F, the mean uncertainty far from every boundary, stands in
    its place. (Li et al., MICCAI 2025; with `within_class` or `soft` its successor PriUS, arXiv 2605.10984.)

    Args:
        num_epochs, good_model_step, annealing_steps: T, t0 and the length of the KL ramp, in epochs. Defaults are the
            published ones (100, 30, 20).
        gradient_weight: beta, the weight of the gradient-uncertainty loss L_gu.
        far_weight: weight of F, in steps without noised logits.
        noise_weight: gamma, the weight of the noise-uncertainty loss L_nu, in steps with them.
        noise_weights: of L_mu, L_d and L_far within L_nu. beta, gamma and these are 1 for want of published values.
        supervision: form of L_gu: `covariance`, `correlation` or `exact`, the ranking of all pairs. The covariance has
            no gradient where the relation has the wanted sign; `sure train`, whose results the README shows, takes
            supervision="correlation", margin=0.3, gradient_weight=3, far_weight=20 (docs/supervision.md compares them).
        margin: how strong a relation supervision="correlation" asks for: until the correlation is -margin.
        within_class: compare voxels only within a class (PriUS): those of L_gu, for supervision="exact", and of L_d.
        soft: `SoftThresholds` for PriUS's sigmoid forms of L_gu and L_nu; `supervision` then does not apply.
        Everything else as `supervised_evidential_loss`, with the published weights 10, 1, 10 as defaults.

    forward(input, target, *, image=None, gradient=None, distance=None, band=None, mask=None, noisy=None, levels=None,
    points=None, generator=None):
        image (N, M, *spatial), or the gradient magnitude computed once, is needed from epoch `good_model_step` on.
        Before, it is checked but not read, and a warning says once that it will be needed; where beta and w_far are 0
        it never is. `noisy` is a sequence of logits for noised images, `levels` and `points` are as in
        `noise_uncertainty_loss`. `generator` draws the pairs of the soft forms. Returns a 0-d loss, with `return_terms`
        also SURETerms.

    Raises:
        ValueError: unless num_epochs > good_model_step, and as the functions it calls.
        TypeError: for noised logits without levels.
    """

    _warned = False

    def __init__(
        self,
        *,
        num_epochs: float = 100,
        good_model_step: float = 30,
        annealing_steps: float = 20,
        gradient_weight: float = 1.0,
        far_weight: float = 1.0,
        noise_weight: float = 1.0,
        noise_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        supervision: str = "covariance",
        within_class: bool = False,
        margin: float = 0.0,
        soft: functional.SoftThresholds | None = None,
        ace_weight: float = 10.0,
        kl_weight: float = 1.0,
        dice_weight: float = 10.0,
        kind: str = "digamma",
        evidence: str = "softplus",
        prior: Numbers = 1.0,
        dice: str = "adaptive_tversky",
        class_weight: Numbers | None = None,
        include_background: bool = True,
        ignore_index: int = -100,
        boundary: float = 1.0,
        near: float = 4.0,
        far: float = 4.0,
        relation: str = "decreasing",
        operator: str = "sobel",
        spacing: Numbers | None = None,
        padding_mode: str = "replicate",
        channel_reduction: str = "l2",
        process_group: Any | None = None,
        compat: str | None = None,
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        self.num_epochs = check_number(num_epochs, "num_epochs")
        self.good_model_step = check_number(good_model_step, "good_model_step")
        self.annealing_steps = check_number(annealing_steps, "annealing_steps")
        schedules.supervision_weight(0, self.good_model_step, self.num_epochs)
        # Checked here, not in epoch `good_model_step`, hours into a training.
        functional.check_supervision(
            supervision, within_class if soft is None else False, gradient_weight, far_weight, relation, margin
        )
        functional.check_thresholds(boundary, near, far)
        functional.check_soft(soft)
        self.kl_weight = check_number(kl_weight, "kl_weight")
        self.gradient_weight = float(gradient_weight)
        self.far_weight = float(far_weight)
        self.noise_weight = check_number(noise_weight, "noise_weight")
        _, self.noise_weights = functional.check_noise(
            near, noise_weights, None, process_group, compat, return_terms, "noise_weights"
        )
        self.within_class = check_bool(within_class, "within_class")
        self.soft = soft
        self.return_terms = return_terms
        self.dirichlet_options: dict[str, Any] = {"evidence": evidence, "prior": prior, "measures": ("vacuity",)}
        self.evidential_options: dict[str, Any] = {
            "kind": kind,
            "evidence": evidence,
            "prior": prior,
            "ace_weight": ace_weight,
            "dice_weight": dice_weight,
            "dice": dice,
            "class_weight": class_weight,
            "include_background": include_background,
            "ignore_index": ignore_index,
            "process_group": process_group,
            "compat": compat,
        }
        self.filter_options: dict[str, Any] = {
            "operator": operator,
            "spacing": spacing,
            "padding_mode": padding_mode,
            "channel_reduction": channel_reduction,
        }
        self.supervision_options: dict[str, Any] = {
            "supervision": "covariance" if soft is not None else supervision,
            "within_class": within_class and soft is None,
            "margin": margin if soft is None else 0.0,
            "boundary": boundary,
            "near": near,
            "far": far,
            "relation": relation,
            **self.filter_options,
        }
        functional.check_evidential(**self.evidential_options, kl_weight=kl_weight, return_terms=return_terms)
        functional.check_filter(**self.filter_options)
        for options in (
            self.dirichlet_options,
            self.evidential_options,
            self.filter_options,
            self.supervision_options,
        ):
            options.update(_settled(options))
        self.epoch = 0.0

    def set_epoch(self, epoch: float) -> None:
        """Epoch t >= 0 (fractions allowed) that lambda and annealing are computed for."""
        self.epoch = check_number(epoch, "epoch")

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.epoch, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.set_epoch(float(plain_tensor(state, "epoch")))

    @property
    def current_kl_weight(self) -> float:
        """lambda(epoch) times the KL weight."""
        return self.kl_weight * schedules.kl_weight(self.epoch, self.annealing_steps)

    @property
    def current_supervision_weight(self) -> float:
        """annealing(epoch)."""
        return schedules.supervision_weight(self.epoch, self.good_model_step, self.num_epochs)

    @property
    def wants_noise(self) -> bool:
        """Whether noised logits would be used in this epoch: without, a caller need not compute them."""
        return self.current_supervision_weight * self.noise_weight > 0 and max(self.noise_weights) > 0

    def vacuity(self, logits: Tensor) -> Tensor:
        """The uncertainty that is supervised: (N, K, *spatial) logits to (N, 1, *spatial)."""
        return functional.dirichlet_uncertainty(logits, **self.dirichlet_options).vacuity

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        image: Tensor | None = None,
        gradient: Tensor | None = None,
        distance: Tensor | None = None,
        band: Tensor | None = None,
        mask: Tensor | None = None,
        noisy: Sequence[Tensor] | None = None,
        levels: Sequence[float | Tensor] | Tensor | None = None,
        points: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        z = check_logits(input)
        _check_noised(noisy, levels, z)
        annealing = self.current_supervision_weight
        if annealing == 0:
            self._check_later(z, image, gradient, distance, band)
        noised = noisy if self.wants_noise else None
        beta, far = annealing * self.gradient_weight, annealing * self.far_weight if noised is None else 0.0
        softly = beta > 0 and self.soft is not None
        options: dict[str, Any] = {**self.evidential_options, "kl_weight": self.current_kl_weight, "mask": mask}
        options["return_terms"] = self.return_terms
        fused = 0.0 if softly else beta
        if fused == far == 0:
            found = functional.evidential_loss(input, target, **options)
        else:
            options |= {"gradient": gradient, "distance": distance, "band": band, **self.supervision_options}
            found = functional.supervised_evidential_loss(
                input, target, image, gradient_weight=fused, far_weight=far, **options
            )
        loss, *given = found if self.return_terms else (found, ())
        terms = dict(zip(SURETerms._fields, *given, strict=False))

        if noised is not None or softly:
            mask = check_mask(mask, len(z), z.shape[2:], z)
            labels = check_target(target, z, self.evidential_options["ignore_index"], mask)
            clean = self.vacuity(input)
            distance = self._distance(labels, clean) if distance is None else distance
            shared = self._shared(labels, mask, generator)
            if softly:
                g = functional.gradient_magnitude(image, **self.filter_options) if gradient is None else gradient  # type: ignore[arg-type]  # checked there
                relation = self.supervision_options["relation"]
                ranking = functional.gradient_uncertainty_loss(clean, g, distance, relation=relation, **shared)
                loss, terms["gradient"] = loss + beta * ranking, ranking.detach()
            if noised is not None:
                near = self.supervision_options["near"]
                noise, (mu, d, far_term) = functional.noise_uncertainty_loss(
                    clean,
                    [self.vacuity(z) for z in noised],
                    levels,  # type: ignore[arg-type]  # not None, see above
                    distance,
                    points=points,
                    near=near,
                    weights=self.noise_weights,
                    return_terms=True,
                    **shared,
                )
                loss = loss + annealing * self.noise_weight * noise
                terms |= {"far": far_term, "mu": mu, "d": d}
        if not self.return_terms:
            return loss
        zeros = {name: torch.zeros_like(loss.detach()) for name in SURETerms._fields if name not in terms}
        return loss, SURETerms(**terms, **zeros)

    def _check_later(
        self,
        logits: Tensor,
        image: Tensor | None,
        gradient: Tensor | None,
        distance: Tensor | None,
        band: Tensor | None,
    ) -> None:
        """What only epoch `good_model_step` would refuse, hours into a training."""
        later = self.gradient_weight > 0 or (self.far_weight > 0 and self.noise_weight == 0)
        if later and image is None and gradient is None and not (self._warned or torch.compiler.is_compiling()):
            self._warned = True
            warnings.warn(
                f"image: got None and no `gradient`; from epoch {self.good_model_step:g} (good_model_step) on the "
                "uncertainty is supervised, which needs one of them",
                stacklevel=5,  # the caller of the module
            )
        if later and self.soft is None:
            functional.check_supervision_maps(logits, image, gradient, distance, band, **self.filter_options)

    def _distance(self, labels: Tensor, like: Tensor) -> Tensor:
        """As far as any threshold reaches; the soft ones have no end."""
        reach = max(self.supervision_options["near"], self.supervision_options["far"])
        return functional.boundary_distance(
            labels,
            max_distance=reach if self.soft is None else None,
            spacing=self.filter_options["spacing"],
            spatial_dims=like.ndim - 2,
            ignore_index=self.evidential_options["ignore_index"],
        )

    def _shared(self, labels: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> dict[str, Any]:
        """Arguments of both losses of uncertainty maps."""
        grouped = self.within_class or self.soft is not None
        return {
            "soft": self.soft,
            "groups": labels if grouped else None,
            "mask": counted_voxels(labels, self.evidential_options["ignore_index"], mask),
            "generator": generator,
            "process_group": self.evidential_options["process_group"],
            "compat": self.evidential_options["compat"],
        }

    def extra_repr(self) -> str:
        return (
            f"epoch={self.epoch:g}/{self.num_epochs:g}, good_model_step={self.good_model_step:g}, "
            f"gradient_weight={self.gradient_weight:g}, far_weight={self.far_weight:g}, "
            f"noise_weight={self.noise_weight:g}"
        )


def _check_noised(noisy: Sequence[Tensor] | None, levels: object, like: Tensor) -> None:
    """Noised logits come with levels, and each looks like the clean ones."""
    if noisy is None:
        if levels is not None:
            raise TypeError("noisy: expected noised logits with levels, got None")
        return
    check_sequence(noisy, "noisy", "logits")
    if levels is None:
        raise TypeError(f"levels: expected {len(noisy)} numbers, one for each of the noised logits, got None")
    for i, z in enumerate(noisy):
        if shape_of(check_float_map(z, f"noisy[{i}]")) != shape_of(like):
            raise ValueError(f"noisy[{i}]: expected shape {shape_of(like)} like the clean logits, got {shape_of(z)}")
        check_same_device(z, f"noisy[{i}]", like, "the clean logits")
