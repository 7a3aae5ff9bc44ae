"""Patch centres one at a time, and noise added patch by patch (Li et al., MICCAI 2025, active hard-sample detection).

Voxels are tried in the order of falling priority. A centre is taken where its patch lies in the image and meets no
patch taken before: first for each class `patches_per_class` among its candidates, then anywhere for what is missing.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def hard_sample_mask(clean: Tensor, noised: Tensor) -> Tensor:
    """Where uncertainty did not rise under noise."""
    return noised <= clean


def patch_centres(
    priority: Tensor, target: Tensor, candidates: Tensor, num_classes: int, patches_per_class: int, patch_size: int
) -> Tensor:
    """Centres (N, num_classes * patches_per_class, ndim) int64 in order of class, -1 where no patch fits any more.

    `priority`, labels `target` and boolean `candidates` are (N, *spatial).
    """
    shape, radius = target.shape[1:], patch_size // 2
    out = torch.full((len(target), num_classes * patches_per_class, len(shape)), -1, device=target.device)
    for n in range(len(target)):
        order = torch.sort(priority[n].flatten(), descending=True, stable=True).indices
        free = torch.zeros(shape, dtype=torch.bool, device=target.device)
        free[tuple(slice(radius, s - radius) for s in shape)] = True

        def take(slot: Tensor, allowed: Tensor, order: Tensor = order, free: Tensor = free) -> None:
            left = order[(allowed & free).flatten()[order]]
            if len(left):
                slot.copy_(torch.stack(torch.unravel_index(left[0], shape)))
                free[tuple(slice(max(i - patch_size + 1, 0), i + patch_size) for i in slot.tolist())] = False

        for c in range(num_classes):
            for slot in out[n, c * patches_per_class : (c + 1) * patches_per_class]:
                take(slot, candidates[n] & (target[n] == c))
        for slot in out[n]:
            if int(slot[0]) < 0:
                take(slot, free)
    return out


def add_patches(image: Tensor, centres: Tensor, noise: Tensor, patch_size: int) -> Tensor:
    """`image` (N, M, *spatial) with `noise` (N, M, P, patch_size^ndim) added around each of the P centres."""
    out, radius = image.clone(), patch_size // 2
    for n, p in itertools.product(range(len(image)), range(centres.shape[1])):
        centre = centres[n, p].tolist()
        if centre[0] >= 0:
            patch = out[n][(slice(None), *(slice(i - radius, i + radius + 1) for i in centre))]
            patch += noise[n, :, p].view_as(patch)
    return out
