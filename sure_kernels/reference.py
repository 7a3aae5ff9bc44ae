"""The public functions in plain PyTorch: short, readable, any dtype, straight from the formulas.

Same names and arguments as in `sure_kernels`; differentiable by autograd. Beside them stand the formulas that they
are made of, on concentrations and on maps of uncertainty. Kernels are held to these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from sure_kernels import functional, metrics
from sure_kernels.backends import backend
from sure_kernels.ops.evidential.reference import (
    adaptive_tversky,
    dirichlet_kl,
    expected_cross_entropy,
    soft_dice,
)
from sure_kernels.ops.soft.reference import (
    prius_distance_loss,
    soft_distance_loss,
    soft_gradient_loss,
    soft_indicator,
    soft_noise_loss,
    window_max,
    window_mean,
)
from sure_kernels.ops.supervised.reference import covariance_supervision

__all__ = [
    "adaptive_tversky",
    "boundary_band",
    "boundary_distance",
    "covariance_supervision",
    "dirichlet_kl",
    "dirichlet_uncertainty",
    "evidential_loss",
    "expected_cross_entropy",
    "gradient_magnitude",
    "gradient_uncertainty_loss",
    "noise_uncertainty_loss",
    "pairwise_ranking_loss",
    "prius_distance_loss",
    "sample_noise_patches",
    "segmentation_histograms",
    "soft_dice",
    "soft_distance_loss",
    "soft_gradient_loss",
    "soft_indicator",
    "soft_noise_loss",
    "supervised_evidential_loss",
    "window_max",
    "window_mean",
]

F = TypeVar("F", bound=Callable[..., Any])


def _by_reference(function: F) -> F:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with backend("reference"):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


gradient_magnitude = _by_reference(functional.gradient_magnitude)
dirichlet_uncertainty = _by_reference(functional.dirichlet_uncertainty)
evidential_loss = _by_reference(functional.evidential_loss)
boundary_distance = _by_reference(functional.boundary_distance)
boundary_band = _by_reference(functional.boundary_band)
pairwise_ranking_loss = _by_reference(functional.pairwise_ranking_loss)
gradient_uncertainty_loss = _by_reference(functional.gradient_uncertainty_loss)
noise_uncertainty_loss = _by_reference(functional.noise_uncertainty_loss)
sample_noise_patches = _by_reference(functional.sample_noise_patches)
supervised_evidential_loss = _by_reference(functional.supervised_evidential_loss)
segmentation_histograms = _by_reference(metrics.segmentation_histograms)
