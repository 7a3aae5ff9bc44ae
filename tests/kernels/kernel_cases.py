"""What the kernel tests share: layouts, upstream gradients, comparison, offsets past 2^31."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

# Outputs in 16 bits, as a share of the largest entry; the interpreter truncates bfloat16 where a GPU rounds.
HALF_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}

LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded")
UPSTREAM = ("dense", "expanded", "transposed")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` (N, C, *spatial) in another memory layout; `expanded` repeats those of its first image."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, float("nan"))), -1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


def upstream_like(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A gradient for `x`: dense, one number with stride 0 everywhere, or transposed in memory."""
    if kind == "expanded":
        return torch.full((), 0.7, dtype=x.dtype, device=x.device).expand_as(x)
    g = torch.randn(x.shape, generator=generator).to(x)
    return laid_out(g, "transposed") if kind == "transposed" else g


def largest_error(got: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """Largest difference as a share of the largest expected entry, or of `least` where that is larger.

    Infinite where something is not finite.
    """
    difference = (got.detach().double().cpu() - expected.detach().double().cpu()).abs()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max()) / max(float(expected.detach().abs().max()), least)


def with_gradient(function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, kind: str) -> tuple[list[Tensor], Tensor]:
    """Results of `function` at `x`, and the gradient for upstream gradients that depend on `kind` alone."""
    leaf = x.detach().requires_grad_()
    results = list(function(leaf))
    generator = torch.Generator().manual_seed(7)
    upstream = [upstream_like(r, kind, generator) for r in results]
    (gradient,) = torch.autograd.grad(results, leaf, upstream)
    return [r.detach() for r in results], gradient


def reserved(size: int, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """`size` elements that are nowhere touched, so that the CPU keeps no memory for them; skips where there is none."""
    needed = size * dtype.itemsize
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < needed + (1 << 30):
            pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} GiB are free")
    try:
        return torch.empty(size, dtype=dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"{needed >> 30} GiB cannot be reserved: {error}")


def far_apart(x: Tensor) -> Tensor:
    """The values of (2, C, *spatial) `x` with images and channels more than 2^31 elements apart.

    What lies between them is `reserved`.
    """
    channels = x.shape[1]
    voxels = x[0, 0].numel()
    s_channel = 2**31 // (channels - 1) + 64
    s_image = 2**31 + 2 * voxels + 128
    storage = reserved(s_image + (channels - 1) * s_channel + voxels, x.dtype, x.device)
    strides = (s_image, s_channel, *x[0, 0].contiguous().stride())
    return storage.as_strided(x.shape, strides).copy_(x)
