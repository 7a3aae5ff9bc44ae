"""From an image to probability, uncertainty and labels: sliding windows that blend evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import Tensor

import sure_kernels as sk
from sure.checkpoint import Run
from sure.errors import UserError
from sure_kernels.kernel_lib.special import evidence

OVERLAP = 0.5
WINDOWS_PER_BATCH = {2: 16, 3: 2}
SLICES = 16
"""Of a volume that a 2D run answers at a time."""
PLANES = 8
"""Of a volume that a 3D run answers at a time."""


class Inference(NamedTuple):
    """What a run says about one image; `spatial` is the image's own."""

    probability: Tensor
    """(K, *spatial) float32, expected class probabilities."""
    uncertainty: Tensor
    """(1, *spatial) float32: vacuity in (0, 1]; for dice_ce the entropy of the probability over log K."""
    label: Tensor
    """(*spatial) uint8, the most probable class."""


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
    check_image(run, image)
    spatial = image.shape[2:]
    whole = Inference(
        torch.empty((run.num_classes, *spatial), device=image.device),
        torch.empty((1, *spatial), device=image.device),
        torch.empty(spatial, dtype=torch.uint8, device=image.device),
    )
    for part, slab in infer_slabs(run, image):
        whole.probability[:, *part], whole.uncertainty[:, *part], whole.label[part] = slab
    return whole


def check_image(run: Run, image: Tensor) -> None:
    """UserError unless the run can read `image`, (1, M, *spatial)."""
    spatial_dims = image.ndim - 2
    if image.ndim < 2 or image.shape[:2] != (1, run.in_channels):
        raise UserError(f"image: expected shape (1, {run.in_channels}, *spatial), got {tuple(image.shape)}")
    if spatial_dims not in ({2, 3} if run.config.spatial_dims == 2 else {3}):
        raise UserError(f"image: a {run.config.spatial_dims}D run cannot read {spatial_dims} spatial axes")


def infer_slabs(run: Run, image: Tensor) -> Iterator[tuple[tuple[slice, ...], Inference]]:
    """`infer` in slabs that join up to the image: where each lies, a slice for each spatial axis, and the answer there.

    Of all classes at once no more is held than as many planes as a window is wide. Slabs follow the first axis, those
    of a 2D run on a volume the last.
    """
    check_image(run, image)
    config, spatial = run.config, image.shape[2:]
    if config.spatial_dims == 2:
        batch = as_batch(image, 2)
        for start in range(0, len(batch), SLICES):
            with torch.inference_mode():
                blend = sliding_window_inference(
                    batch[start : start + SLICES].float(),
                    config.patch,
                    WINDOWS_PER_BATCH[2],
                    lambda windows: _window(run, windows),
                    overlap=OVERLAP,
                    mode="gaussian",
                    sw_device=next(run.model.parameters()).device,
                    device=image.device,
                )
                assert isinstance(blend, Tensor)
                found = _answer(run, blend)
            rows = slice(0, spatial[0]), slice(0, spatial[1])
            part = (*rows, slice(start, start + len(blend))) if len(spatial) == 3 else rows
            probability, uncertainty, label = (as_volume(t, len(spatial)) for t in found)
            yield part, Inference(probability, uncertainty, label[0])
        return
    for start, blend in _blended_planes(run, image[0]):
        with torch.inference_mode():
            found = _answer(run, blend[None])
        planes = slice(start, start + blend.shape[1])
        yield (planes, *(slice(0, n) for n in spatial[1:])), Inference(found[0][0], found[1][0], found[2][0, 0])


def _blended_planes(run: Run, image: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What MONAI's sliding_window_inference makes of a volume (M, *spatial), as soon as planes of it are final.

    Windows come in the order of their first axis, and all that start at the same plane cover the same planes: what lies
    before the next start is final. The sums are kept in a ring as long as a window is wide.

    Yields the first plane and the blend (K, planes, H, W), which the next step may overwrite.
    """
    roi, size = run.config.patch, image.shape[1:]
    device = next(run.model.parameters()).device
    margins = [max(w - n, 0) for w, n in zip(roi, size, strict=True)]
    before = [m // 2 for m in margins]  # as MONAI pads
    padding = [p for m, b in zip(margins, before, strict=True) for p in (m - b, b)][::-1]
    padded = F.pad(image, padding) if any(margins) else image
    shape = tuple(padded.shape[1:])
    interval = [int(w * (1 - OVERLAP)) or 1 if w != n else n for w, n in zip(roi, shape, strict=True)]
    windows = dense_patch_slices(shape, roi, interval)
    weight = compute_importance_map(roi, mode="gaussian", sigma_scale=0.125, device=image.device)
    width, kept = roi[0], [slice(b, b + n) for b, n in zip(before[1:], size[1:], strict=True)]
    sums = torch.zeros((run.num_classes, width, *shape[1:]), device=image.device)
    weights = torch.zeros((1, width, *shape[1:]), device=image.device)
    starts = sorted({w[0].start for w in windows})
    for start, following in zip(starts, [*starts[1:], shape[0]], strict=True):
        level = [w for w in windows if w[0].start == start]
        turn = start % width
        with torch.inference_mode():
            for i in range(0, len(level), WINDOWS_PER_BATCH[3]):
                group = level[i : i + WINDOWS_PER_BATCH[3]]
                batch = torch.stack([padded[(slice(None), *w)] for w in group]).to(device).float()
                for w, values in zip(group, _window(run, batch).to(image.device), strict=True):
                    values = values * weight
                    for ring, added in ((sums, values), (weights, weight[None])):
                        ring[:, turn:, w[1], w[2]] += added[:, : width - turn]
                        ring[:, :turn, w[1], w[2]] += added[:, width - turn :]
            # A few planes at a time, so that what is made of them stays small.
            for first in range(start, following, PLANES):
                planes = [p for p in range(first, min(first + PLANES, following)) if 0 <= p - before[0] < size[0]]
                at = [p % width for p in planes]
                if planes:
                    yield planes[0] - before[0], (sums[:, at] / weights[:, at])[:, :, kept[0], kept[1]]
            for p in range(start, following):
                sums[:, p % width], weights[:, p % width] = 0, 0


def _answer(run: Run, blend: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probability (N, K, *spatial), uncertainty and label (N, 1, *spatial) of a blend (N, K, *spatial)."""
    config = run.config
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
    return probability, uncertainty, probability.argmax(1, keepdim=True).to(torch.uint8)


def as_batch(volume: Tensor, spatial_dims: int) -> Tensor:
    """(1, C, H, W, D) as the slices (D, C, H, W) that a 2D run sees; anything else unchanged."""
    return volume[0].movedim(-1, 0) if volume.ndim - 2 > spatial_dims else volume


def as_volume(batch: Tensor, spatial_dims: int) -> Tensor:
    """Undo `as_batch`, without the leading axis: (C, *spatial) with `spatial_dims` spatial axes."""
    return batch.movedim(0, -1) if spatial_dims > batch.ndim - 2 else batch[0]


def _window(run: Run, windows: Tensor) -> Tensor:
    logits = run.model(windows).float()
    return logits.softmax(1) if run.config.loss == "dice_ce" else evidence(logits, run.config.evidence)
