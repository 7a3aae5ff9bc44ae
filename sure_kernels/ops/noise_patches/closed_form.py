"""Patch centres for all images at once: as many rounds as patches, each of which takes the best voxel left.

A round takes in every image the voxel of highest priority among those still free, and blocks the centres whose patches
would meet the new one, a window of 2 patch_size - 1. What comes out is what trying the voxels one by one, in the order
of their priority, gives: with random priorities, random sequential placement. The number of rounds is known
beforehand, so that nothing waits for the device and nothing loops for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Below every priority.
_BLOCKED = -1.0


def _window(radius: int, ndim: int, device: torch.device) -> Tensor:
    """Offsets ((2 radius + 1)^ndim, ndim)."""
    steps = torch.arange(-radius, radius + 1, device=device)
    return torch.stack(torch.meshgrid(*(steps,) * ndim, indexing="ij"), -1).flatten(0, -2)


def _coordinates(index: Tensor, shape: Sequence[int]) -> Tensor:
    """Coordinates (..., ndim) of flat positions; torch.unravel_index copies the shape to the device, and waits."""
    found: list[Tensor] = []
    for size in reversed(shape):
        found.insert(0, index % size)
        index = index // size
    return torch.stack(found, -1)


def _around(centres: Tensor, window: Tensor, shape: Sequence[int]) -> Tensor:
    """Flat positions (..., window) around centres (..., ndim), cut at the border."""
    cells = centres.unsqueeze(-2) + window
    index = torch.zeros_like(cells[..., 0])
    for axis, size in enumerate(shape):
        index = index * size + cells[..., axis].clamp(0, size - 1)
    return index


def _block(score: Tensor, cells: Tensor, taken: Tensor) -> None:
    """Block the `cells` (N, window) of `score` (N, V) in the images where a patch was taken."""
    score.scatter_(1, cells, torch.where(taken.unsqueeze(1), _BLOCKED, score.gather(1, cells)))


def patch_centres(
    priority: Tensor, target: Tensor, candidates: Tensor, num_classes: int, patches_per_class: int, patch_size: int
) -> Tensor:
    """As the reference's; `priority` holds numbers from 0 to 1."""
    shape, radius = target.shape[1:], patch_size // 2
    free = torch.full_like(priority, _BLOCKED)
    inside = (slice(None), *(slice(radius, s - radius) for s in shape))
    free[inside] = priority[inside]
    free, labels, candidates = free.flatten(1), target.flatten(1), candidates.flatten(1)
    window = _window(patch_size - 1, len(shape), priority.device)
    out = torch.full((len(target), num_classes * patches_per_class), -1, dtype=torch.int64, device=priority.device)

    def take(score: Tensor, slot: int, wanted: Tensor | None) -> None:
        best, index = score.max(1)
        taken = best >= 0 if wanted is None else wanted & (best >= 0)
        out[:, slot] = torch.where(taken, index, out[:, slot])
        cells = _around(_coordinates(index, shape), window, shape)
        _block(free, cells, taken)
        if score is not free:
            _block(score, cells, taken)

    for c in range(num_classes):
        score = torch.where(candidates & (labels == c), free, _BLOCKED)
        for slot in range(c * patches_per_class, (c + 1) * patches_per_class):
            take(score, slot, None)
    for slot in range(out.shape[1]):
        missing = out[:, slot] < 0
        # On the CPU nobody waits for an answer.
        if missing.device.type != "cpu" or bool(missing.any()):
            take(free, slot, missing)
    centres = _coordinates(out.clamp_min(0), shape)
    return torch.where(out.unsqueeze(-1) >= 0, centres, -1)


def add_patches(image: Tensor, centres: Tensor, noise: Tensor, patch_size: int) -> Tensor:
    """As the reference's, for patches that do not overlap."""
    n, m, *shape = image.shape
    window = _window(patch_size // 2, len(shape), image.device)
    cells = _around(centres.clamp_min(0), window, shape)  # (N, P, window)
    there = (centres >= 0).all(-1)[:, None, :, None]
    values = torch.where(there, noise, 0.0).to(image.dtype).flatten(2)
    # Patches do not overlap and those that are not there add 0, so that the order of additions does not matter.
    out = image.flatten(2).clone(memory_format=torch.contiguous_format)
    return out.scatter_add_(2, cells.flatten(1).unsqueeze(1).expand(n, m, -1), values).view(image.shape)
