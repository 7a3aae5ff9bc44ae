"""Losses and uncertainty maps for evidential 3D segmentation, with their gradients in closed form."""

from sure_kernels import reference
from sure_kernels.backends import (
    BackendUnavailableError,
    backend,
    backends,
    get_backend,
    set_backend,
)
from sure_kernels.functional import (
    EvidentialTerms,
    SupervisedTerms,
    boundary_band,
    boundary_distance,
    dirichlet_uncertainty,
    evidential_loss,
    gradient_magnitude,
    supervised_evidential_loss,
)

__version__ = "0.1.0"
