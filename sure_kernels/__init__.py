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
    SupervisedTerms,
    boundary_band,
    boundary_distance,
    dirichlet_uncertainty,
    evidential_loss,
    gradient_magnitude,
    gradient_uncertainty_loss,
    pairwise_ranking_loss,
    supervised_evidential_loss,
)
from sure_kernels.modules import DirichletUncertainty, EvidentialLoss, GradientMagnitude, SURELoss

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "DirichletUncertainty",
    "EvidentialLoss",
    "EvidentialTerms",
    "GradientMagnitude",
    "SURELoss",
    "SupervisedTerms",
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
    "metrics",
    "pairwise_ranking_loss",
    "reference",
    "set_backend",
    "supervised_evidential_loss",
]
