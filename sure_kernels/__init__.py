"""Losses and uncertainty maps for evidential 3D segmentation, with their gradients in closed form."""

from sure_kernels import metrics, reference
from sure_kernels.backends import (
    BackendUnavailableError,
    backend,
    backends,
    get_backend,
    set_backend,
)
from sure_kernels.doctor import doctor
from sure_kernels.functional import (
    EvidentialTerms,
    NoisePatches,
    NoiseTerms,
    SoftThresholds,
    SupervisedTerms,
    add_gaussian_noise,
    boundary_band,
    boundary_distance,
    dirichlet_uncertainty,
    evidential_loss,
    gradient_magnitude,
    gradient_uncertainty_loss,
    hard_sample_mask,
    noise_uncertainty_loss,
    pairwise_ranking_loss,
    sample_noise_patches,
    supervised_evidential_loss,
)
from sure_kernels.modules import (
    DirichletUncertainty,
    EvidentialLoss,
    GradientMagnitude,
    GradientUncertaintyLoss,
    NoiseUncertaintyLoss,
    SURELoss,
    SURETerms,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "DirichletUncertainty",
    "EvidentialLoss",
    "EvidentialTerms",
    "GradientMagnitude",
    "GradientUncertaintyLoss",
    "NoisePatches",
    "NoiseTerms",
    "NoiseUncertaintyLoss",
    "SURELoss",
    "SURETerms",
    "SoftThresholds",
    "SupervisedTerms",
    "add_gaussian_noise",
    "backend",
    "backends",
    "boundary_band",
    "boundary_distance",
    "dirichlet_uncertainty",
    "doctor",
    "evidential_loss",
    "get_backend",
    "gradient_magnitude",
    "gradient_uncertainty_loss",
    "hard_sample_mask",
    "metrics",
    "noise_uncertainty_loss",
    "pairwise_ranking_loss",
    "reference",
    "sample_noise_patches",
    "set_backend",
    "supervised_evidential_loss",
]
