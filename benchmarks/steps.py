"""Whole steps of the published settings, network aside, for comparison with what the published programs take.

`slices`: 24 slices of 128 x 128, 4 classes (SURE on ACDC): distance map, image gradient, evidential loss, exact ranking
of the boundary, hard samples, noise patches and noise losses, forward and backward to three sets of logits.
`ranking`: the exact ranking within each class over the boundary of a volume of 96^3, 4 classes (PriUS), forward and
backward, beside 10^7 sampled pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sure_kernels as sk
from benchmarks.measure import synchronise

_CLASSES, _REPEATS = 4, 7
# Seconds of the published programs' pieces on two cores of the same kind of machine (SURE e30f60a, PriUS 847f3ac, torch
# 2.13.0, medians): 1.27 is edl_loss_a, compute_distance_map twice, compute_gradient, gradient_loss of 10^7 pairs,
# patch sampling and the three nu losses; 2.94 is gradient_loss of 10^7 pairs at 96^3.
TITLES = {
    "slices": "SURE on 24 slices of 128x128: distance, gradient, ranking, patches, noise losses, with gradients",
    "ranking": "PriUS on a volume of 96^3: ranking within classes (all pairs; published: 10^7 sampled)",
}
PUBLISHED = {"slices": 1.27, "ranking": 2.94}


def short_axis_labels(slices: int, size: int) -> Tensor:
    """(slices, size, size): a ventricle in a ring of muscle beside another ventricle, of varying size; one is empty."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
    labels = torch.zeros((slices, size, size), dtype=torch.uint8)
    for i, label in enumerate(labels):
        scale = 0.6 + 0.4 * torch.cos(torch.tensor(3.0 * i / slices))
        left = ((x + 0.1) ** 2 + y**2).sqrt()
        label[((x - 0.4) ** 2 + (y / 1.6) ** 2).sqrt() < 0.45 * scale] = 1
        label[left < 0.58 * scale] = 2
        label[left < 0.4 * scale] = 3
    labels[5 % slices] = 0
    return labels


def slices(device: torch.device) -> Callable[[], None]:
    """The step on slices."""
    g = torch.Generator().manual_seed(0)
    target = short_axis_labels(24, 128).to(device)
    image = torch.randn((24, 1, 128, 128), generator=g).to(device)
    logits = [torch.randn((24, _CLASSES, 128, 128), generator=g).to(device).requires_grad_() for _ in range(4)]
    loss = sk.SURELoss(supervision="exact", good_model_step=0)
    loss.set_epoch(50)

    def step() -> None:
        for leaf in logits:
            leaf.grad = None
        clean, everywhere, *noisy = logits
        distance = sk.boundary_distance(target, max_distance=4.0)
        with torch.no_grad():
            hard = sk.hard_sample_mask(loss.vacuity(clean), loss.vacuity(everywhere))
        patches = sk.sample_noise_patches(image, target, distance, hard, num_classes=_CLASSES)
        maps = {"image": image, "distance": distance, "points": patches.centres}
        loss(clean, target, noisy=noisy, levels=patches.means, **maps).backward()

    return step


def ranking(device: torch.device) -> Callable[[], None]:
    """The ranking in a volume."""
    g = torch.Generator().manual_seed(0)
    target = short_axis_labels(96, 96)[None].to(device)
    distance = sk.boundary_distance(target, max_distance=1.0)
    gradient = torch.rand(distance.shape, generator=g).to(device)
    uncertainty = torch.rand(distance.shape, generator=g).to(device).requires_grad_()

    def step() -> None:
        uncertainty.grad = None
        sk.gradient_uncertainty_loss(uncertainty, gradient, distance, max_distance=0.0, groups=target).backward()

    return step


def seconds(device: torch.device) -> dict[str, Any]:
    """Median and fastest seconds of each step, and those of the published programs."""
    found: dict[str, Any] = {}
    for name, make in (("slices", slices), ("ranking", ranking)):
        step, times = make(device), []
        for _ in range(_REPEATS + 1):
            synchronise(device)
            began = time.perf_counter()
            step()
            synchronise(device)
            times.append(time.perf_counter() - began)
        found[name] = {"median": statistics.median(times[1:]), "fastest": min(times[1:]), "published": PUBLISHED[name]}
    return found
