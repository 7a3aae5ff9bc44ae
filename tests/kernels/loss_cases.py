"""What the tests of the two losses share: cases, and comparison with the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import largest_error
from torch import Tensor

import sure_kernels as sk
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR

IGNORED = -100
INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def case(shape: tuple[int, ...], device: str, *, scale: float = 3.0, ignored: float = 0.1, seed: int = 0):
    """Logits (N, K, *spatial), labels with ignored voxels, a mask, an image of one channel and a band."""
    generator = torch.Generator().manual_seed(seed)
    n, k, *spatial = shape
    logits = scale * torch.randn(shape, generator=generator)
    target = torch.randint(0, k, (n, *spatial), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORED
    mask = torch.rand(target.shape, generator=generator) < 0.8
    image = torch.rand((n, 1, *spatial), generator=generator)
    band = torch.randint(0, 4, (n, 1, *spatial), generator=generator, dtype=torch.uint8)
    return [x.to(device) for x in (logits, target, mask, image, band)]


def evaluate(function: Any, logits: Tensor, *args: Any, upstream: float = 2.5, **options: Any):
    """(loss, terms, gradient) at `logits`."""
    leaf = logits.detach().requires_grad_()
    loss, terms = function(leaf, *args, return_terms=True, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    return loss.detach(), torch.stack(list(terms)), gradient


def compare(
    name: str,
    logits: Tensor,
    *args: Any,
    value_tolerance: float = 1e-6,
    gradient_tolerance: float = 2e-6,
    **options: Any,
) -> None:
    """The loss `name` in Triton against the reference in float64 at the same values.

    `value_tolerance` bounds the error of the loss and of each term, relative where they exceed 1;
    `gradient_tolerance` that of the gradient, as a share of its largest entry.
    """
    loss, terms, got = evaluate(getattr(sk, name), logits, *args, **options)
    with sk.backend("reference"):
        expected_loss, expected_terms, expected = evaluate(getattr(sk, name), logits.double(), *args, **options)
    assert loss.dtype == terms.dtype == torch.float32
    assert loss.shape == ()
    assert got.dtype == logits.dtype
    difference = torch.cat(((terms - expected_terms).abs(), (loss - expected_loss).abs().view(1)))
    scale = torch.cat((expected_terms.abs(), expected_loss.abs().view(1))).clamp_min(1)
    assert float((difference / scale).max()) <= value_tolerance
    assert (
        largest_error(got, expected) <= gradient_tolerance or float(got.abs().max()) == float(expected.abs().max()) == 0
    )


def related(image: Tensor, band: Tensor) -> Tensor:
    """Logits whose uncertainty rises with the image, so that the covariance is active."""
    g = sk.gradient_magnitude(image)
    strength = torch.where(band == BOUNDARY, 3 - 2 * g / g.amax().clamp_min(1e-30), torch.where(band == FAR, 1.0, 0.5))
    return torch.cat((strength, -strength, 0.3 * strength), 1)
