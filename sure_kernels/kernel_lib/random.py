"""Random numbers for a device from a generator that may live on another: the same generator gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Float32 in [0, 1)."""
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=source).to(device)


def normal(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Float32 of mean 0 and standard deviation 1."""
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


def permutation(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """The numbers from 0 to n - 1 in random order, int64."""
    source = device if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=source).to(device)
