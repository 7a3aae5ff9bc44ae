"""One row per op: what tests, benchmarks and the doctor run.

A row names the public function, the room (sub-package of `sure_kernels.ops`) its implementations live in, and how to
make an example call of any size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sure_kernels import functional, metrics, reference

Call = tuple[tuple[Tensor, ...], dict[str, Any]]
PARTS = ("reference", "closed_form", "op")


@dataclass(frozen=True)
class OpSpec:
    """A public op.

    Attributes:
        name: public name.
        room: sub-package of `sure_kernels.ops`.
        example: (generator, classes, spatial shape, dtype) -> positional and keyword arguments on the CPU; the first
            positional argument is the one that gets a gradient, where there is one.
        differentiable: whether the op has a backward.
        parts: modules the room must have.
        home: where the public function is found.
    """

    name: str
    room: str
    example: Callable[[torch.Generator, int, tuple[int, ...], torch.dtype], Call]
    differentiable: bool = True
    parts: tuple[str, ...] = PARTS
    home: ModuleType = functional

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(self.home, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.name)

    def part(self, name: str) -> ModuleType:
        return importlib.import_module(f"sure_kernels.ops.{self.room}.{name}")


def _logits(g: torch.Generator, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn((1, k, *shape), generator=g)).to(dtype)


def blobs(g: torch.Generator, k: int, shape: tuple[int, ...]) -> Tensor:
    """Labels (1, *shape) in smooth regions, so that there are boundaries and voxels far from them."""
    coarse = torch.rand((1, k, *(max(2, s // 12) for s in shape)), generator=g)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return torch.nn.functional.interpolate(coarse, shape, mode=mode, align_corners=True).argmax(1)


def _image(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn((1, 1, *shape), generator=g).to(dtype)


def _ranked(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An uncertainty and a gradient magnitude."""
    return torch.rand((1, 1, *shape), generator=g).to(dtype), torch.rand((1, 1, *shape), generator=g)


def _uncertainty(g: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.rand((1, 1, *shape), generator=g).to(dtype)


OPS = (
    OpSpec("gradient_magnitude", "gradient_magnitude", lambda g, k, s, d: ((_image(g, s, d),), {})),
    OpSpec(
        "dirichlet_uncertainty",
        "dirichlet",
        lambda g, k, s, d: (
            (_logits(g, k, s, d),),
            {"measures": ("probability", "vacuity", "entropy", "mutual_information")},
        ),
    ),
    OpSpec("evidential_loss", "evidential", lambda g, k, s, d: ((_logits(g, k, s, d), blobs(g, k, s)), {})),
    OpSpec(
        "supervised_evidential_loss",
        "supervised",
        lambda g, k, s, d: ((_logits(g, k, s, d), blobs(g, k, s), _image(g, s, d)), {}),
    ),
    OpSpec(
        "boundary_distance",
        "boundary_distance",
        lambda g, k, s, d: ((blobs(g, k, s),), {"max_distance": 4.0}),
        differentiable=False,
    ),
    OpSpec(
        "boundary_band",
        "boundary_distance",
        lambda g, k, s, d: ((blobs(g, k, s),), {"near": 4.0, "far": 4.0}),
        differentiable=False,
    ),
    OpSpec("pairwise_ranking_loss", "ranking", lambda g, k, s, d: (_ranked(g, s, d), {})),
    OpSpec(
        "gradient_uncertainty_loss",
        "ranking",
        lambda g, k, s, d: (
            (*_ranked(g, s, d), functional.boundary_distance(blobs(g, k, s), max_distance=1.0)),
            {},
        ),
    ),
    OpSpec(
        "noise_uncertainty_loss",
        "noise",
        # Its ranking has a row of its own.
        lambda g, k, s, d: (
            (
                _uncertainty(g, s, d),
                torch.stack([_uncertainty(g, s, d) for _ in range(2)]),
                torch.tensor((0.3, 0.8)),
                functional.boundary_distance(blobs(g, k, s), max_distance=4.0),
            ),
            {"weights": (1.0, 0.0, 1.0)},
        ),
    ),
    OpSpec(
        "segmentation_histograms",
        "histograms",
        lambda g, k, s, d: (
            (_logits(g, k, s, d).softmax(1), blobs(g, k, s), torch.rand((1, 1, *s), generator=g).to(d)),
            {},
        ),
        differentiable=False,
        home=metrics,
    ),
)
