"""From an image to probability, uncertainty and labels: sliding windows that blend evidence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

import sure_kernels as sk
from sure.checkpoint import Run
from sure.errors import UserError
from sure_kernels.kernel_lib.special import evidence

OVERLAP = 0.5
WINDOWS_PER_BATCH = {2: 16, 3: 2}


class Inference(NamedTuple):
    """What a run says about one image; `spatial` is the image's own."""

    probability: Tensor
    """(K, *spatial) float32, expected class probabilities."""
    uncertainty: Tensor
    """(1, *spatial) float32: vacuity in (0, 1]; for dice_ce the entropy of the probability over log K."""
    label: Tensor
    """(*spatial) uint8, the most probable class."""


@torch.inference_mode()
def infer(run: Run, image: Tensor) -> Inference:
    """Run a trained network over a whole image.

    Overlapping windows of the training patch's size, weighted by a Gaussian, blend the evidence (for dice_ce
    the softmax); probability and uncertainty are computed once, from the blend. Images smaller than a window
    are padded with zeros, the mean of a normalised image, and cropped back. Runs on the model's device, the
    result lies on the image's.

    Args:
        run: a loaded run.
        image: (1, M, *spatial) floating point, normalised like the training images. A 2D run takes slices
            (1, M, H, W), or volumes (1, M, H, W, D) slice by slice along the last axis.

    Raises:
        UserError: channels or dimensions that the run was not trained on.
    """
    config = run.config
    spatial_dims = image.ndim - 2
    if image.ndim < 2 or image.shape[:2] != (1, run.in_channels):
        raise UserError(f"image: expected shape (1, {run.in_channels}, *spatial), got {tuple(image.shape)}")
    if spatial_dims not in ({2, 3} if config.spatial_dims == 2 else {3}):
        raise UserError(f"image: a {config.spatial_dims}D run cannot read {spatial_dims} spatial axes")
    batch = as_batch(image.float(), config.spatial_dims)
    blend = sliding_window_inference(
        batch,
        config.patch,
        WINDOWS_PER_BATCH[config.spatial_dims],
        lambda windows: _window(run, windows),
        overlap=OVERLAP,
        mode="gaussian",
        sw_device=next(run.model.parameters()).device,
        device=image.device,
    )
    assert isinstance(blend, Tensor)
    if not bool(torch.isfinite(blend).all()):
        raise UserError(f"{run.path}: the {run.checkpoint} checkpoint's network gives NaN or infinity")
    if config.loss == "dice_ce":
        probability = blend
        entropy = torch.special.entr(blend).sum(1, keepdim=True)
        uncertainty = (entropy / math.log(run.num_classes)).clamp(max=1)  # rounding may exceed 1
    else:
        # The blend is evidence already: relu leaves it as it is
        prior = config.prior[0] if len(config.prior) == 1 else config.prior
        measured = sk.dirichlet_uncertainty(blend, evidence="relu", prior=prior)
        probability, uncertainty = measured.probability, measured.vacuity
    probability, uncertainty = (as_volume(t, spatial_dims) for t in (probability, uncertainty))
    return Inference(probability, uncertainty, probability.argmax(0).to(torch.uint8))


def as_batch(volume: Tensor, spatial_dims: int) -> Tensor:
    """(1, C, H, W, D) as the slices (D, C, H, W) that a 2D run sees; anything else unchanged."""
    return volume[0].movedim(-1, 0) if volume.ndim - 2 > spatial_dims else volume


def as_volume(batch: Tensor, spatial_dims: int) -> Tensor:
    """Undo `as_batch`, without the leading axis: (C, *spatial) with `spatial_dims` spatial axes."""
    return batch.movedim(0, -1) if spatial_dims > batch.ndim - 2 else batch[0]


def _window(run: Run, windows: Tensor) -> Tensor:
    logits = run.model(windows).float()
    return logits.softmax(1) if run.config.loss == "dice_ce" else evidence(logits, run.config.evidence)
