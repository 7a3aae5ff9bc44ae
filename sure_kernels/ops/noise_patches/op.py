"""Custom ops and fakes of `sample_noise_patches`, which have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.ops.noise_patches import closed_form


@custom_op("sure_kernels::patch_centres")
def patch_centres(
    priority: Tensor, target: Tensor, candidates: Tensor, num_classes: int, patches_per_class: int, patch_size: int
) -> Tensor:
    return closed_form.patch_centres(priority, target, candidates, num_classes, patches_per_class, patch_size)


@patch_centres.register_fake
def _(priority, target, candidates, num_classes, patches_per_class, patch_size):
    shape = (len(target), num_classes * patches_per_class, target.ndim - 1)
    return target.new_empty(shape, dtype=torch.int64)


@custom_op("sure_kernels::add_patches")
def add_patches(image: Tensor, centres: Tensor, noise: Tensor, patch_size: int) -> Tensor:
    return closed_form.add_patches(image, centres, noise, patch_size)


@add_patches.register_fake
def _(image, centres, noise, patch_size):
    return torch.empty_like(image, memory_format=torch.contiguous_format)
