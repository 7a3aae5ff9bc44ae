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
    out = torch.full((len(target), num_classes * patches_per_class, len(shape)), -1, dtype=torch.int64)
    for n in range(len(target)):
        order = torch.sort(priority[n].flatten(), descending=True, stable=True).indices.tolist()
        voxels = [tuple(int(i) for i in torch.unravel_index(torch.tensor(v), shape)) for v in order]
        taken: list[tuple[int, ...]] = []

        def fits(voxel: tuple[int, ...], taken: list[tuple[int, ...]] = taken) -> bool:
            inside = all(radius <= i < s - radius for i, s in zip(voxel, shape, strict=True))
            return inside and all(
                max(abs(a - b) for a, b in zip(voxel, other, strict=True)) >= patch_size for other in taken
            )

        slots = out[n].view(num_classes, patches_per_class, len(shape))
        for c in range(num_classes):
            free = iter(slots[c])
            for voxel in voxels:
                if bool(candidates[n][voxel]) and int(target[n][voxel]) == c and fits(voxel):
                    slot = next(free, None)
                    if slot is None:
                        break
                    slot.copy_(torch.tensor(voxel))
                    taken.append(voxel)
        missing = iter([slot for slot in out[n] if int(slot[0]) < 0])
        for voxel in voxels:
            if fits(voxel):
                slot = next(missing, None)
                if slot is None:
                    break
                slot.copy_(torch.tensor(voxel))
                taken.append(voxel)
    return out.to(target.device)


def add_patches(image: Tensor, centres: Tensor, noise: Tensor, patch_size: int) -> Tensor:
    """`image` (N, M, *spatial) with `noise` (N, M, P, patch_size^ndim) added around each of the P centres."""
    out, radius = image.clone(), patch_size // 2
    for n, p in itertools.product(range(len(image)), range(centres.shape[1])):
        centre = centres[n, p].tolist()
        if centre[0] >= 0:
            patch = (n, slice(None), *(slice(i - radius, i + radius + 1) for i in centre))
            out[patch] += noise[n, :, p].view(out[patch].shape)
    return out
