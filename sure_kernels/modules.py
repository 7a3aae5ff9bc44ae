"""nn.Module wrappers: options in the constructor, tensors in the call, nothing learned.

Losses are called as MONAI and nnU-Net call theirs, `loss(input, target)`; whatever else they need is keyword.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sure_kernels import functional, schedules
from sure_kernels.validation import Numbers, check_choice, check_number


class _Options(nn.Module):
    """Keeps keyword arguments for the function it wraps, and shows them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

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
        super().__init__(evidence=evidence, prior=prior, measures=measures)

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


class SURELoss(nn.Module):
    """The training objective of SURE: evidential segmentation loss and supervised uncertainty, with their schedules.

        L = w_ace ACE + lambda(t) w_kl KL + w_dice (1 - Dice) + annealing(t) (beta L_gu + w_far F)

    with lambda(t) = min(1, t / annealing_steps) and annealing(t) rising from 0.01 at epoch `good_model_step` to 1 at
    `num_epochs`, 0 before. `set_epoch(t)` drives both; the epoch is part of the state_dict.

    Args:
        num_epochs, good_model_step, annealing_steps: T, t0 and the length of the KL ramp, in epochs. Defaults are the
            published ones (100, 30, 20).
        gradient_weight: beta, the weight of the gradient-uncertainty term L_gu.
        far_weight: weight of the mean uncertainty far from every boundary (F).
        noise_weight: gamma, the weight of the noise-uncertainty loss. Only 0 for now.
        supervision: form of L_gu: `covariance`, `correlation` or `exact`, the ranking of all pairs.
        Everything else as `supervised_evidential_loss`, with the published weights 10, 1, 10 as defaults.

    forward(input, target, *, image=None, gradient=None, distance=None, band=None, mask=None):
        image (N, M, *spatial), or the gradient magnitude and band computed once, are needed from epoch
        `good_model_step` on (before it, and where both weights are 0, they are not read). Returns a 0-d loss, with
        `return_terms` also SupervisedTerms, unweighted and detached.

    Raises:
        ValueError: unless num_epochs > good_model_step, and as the functions it calls.
        NotImplementedError: for noise_weight > 0 or noised logits.
    """

    def __init__(
        self,
        *,
        num_epochs: float = 100,
        good_model_step: float = 30,
        annealing_steps: float = 20,
        gradient_weight: float = 1.0,
        far_weight: float = 1.0,
        noise_weight: float = 0.0,
        supervision: str = "covariance",
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
        if check_number(noise_weight, "noise_weight") > 0:
            raise NotImplementedError(
                f"noise_weight: the noise-uncertainty loss is not in this version yet; expected 0, got {noise_weight}"
            )
        check_choice(supervision, "supervision", functional.SUPERVISIONS)
        self.kl_weight = check_number(kl_weight, "kl_weight")
        self.gradient_weight = check_number(gradient_weight, "gradient_weight")
        self.far_weight = check_number(far_weight, "far_weight")
        self.return_terms = return_terms
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
        self.supervision_options: dict[str, Any] = {
            "supervision": supervision,
            "boundary": boundary,
            "near": near,
            "far": far,
            "relation": relation,
            "operator": operator,
            "spacing": spacing,
            "padding_mode": padding_mode,
            "channel_reduction": channel_reduction,
        }
        self.epoch = 0.0

    def set_epoch(self, epoch: float) -> None:
        """Epoch t >= 0 (fractions allowed) that lambda and annealing are computed for."""
        self.epoch = check_number(epoch, "epoch")

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.epoch, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.set_epoch(float(state))

    @property
    def current_kl_weight(self) -> float:
        """lambda(epoch) times the KL weight."""
        return self.kl_weight * schedules.kl_weight(self.epoch, self.annealing_steps)

    @property
    def current_supervision_weight(self) -> float:
        """annealing(epoch)."""
        return schedules.supervision_weight(self.epoch, self.good_model_step, self.num_epochs)

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
        noisy: Any | None = None,
    ) -> Any:
        if noisy is not None:
            raise NotImplementedError("noisy: the noise-uncertainty loss is not in this version yet")
        options = {**self.evidential_options, "kl_weight": self.current_kl_weight, "mask": mask}
        annealing = self.current_supervision_weight
        beta, far = annealing * self.gradient_weight, annealing * self.far_weight
        if beta == 0 and far == 0:
            loss, terms = functional.evidential_loss(input, target, return_terms=True, **options)
            none = torch.zeros_like(loss.detach())
            supervised = functional.SupervisedTerms(terms.ace, terms.kl, terms.dice, none, none)
        else:
            loss, supervised = functional.supervised_evidential_loss(
                input,
                target,
                image,
                gradient=gradient,
                distance=distance,
                band=band,
                gradient_weight=beta,
                far_weight=far,
                return_terms=True,
                **self.supervision_options,
                **options,
            )
        return (loss, supervised) if self.return_terms else loss

    def extra_repr(self) -> str:
        return (
            f"epoch={self.epoch:g}/{self.num_epochs:g}, good_model_step={self.good_model_step:g}, "
            f"gradient_weight={self.gradient_weight:g}, far_weight={self.far_weight:g}"
        )
