"""A training step with a real network: what share of it is the loss?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sure_kernels as sk
from benchmarks.measure import synchronise
from sure_kernels.registry import blobs

# Patches as `sure train` takes them by default.
_BATCH, _CLASSES, _SIZE, _STEPS = 4, 4, 48, 5


def shares(device: torch.device) -> dict[str, Any]:
    """Median seconds of a step of MONAI's UNet and of the loss in it, for ours and the textbook form.

    Where MONAI is not installed, the reason.
    """
    try:
        from monai.networks.nets import UNet
    except ImportError as error:
        return {"absent": f"{type(error).__name__}: {error}"}
    torch.manual_seed(0)
    network = UNet(3, 1, _CLASSES, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(0)
    image = torch.randn((_BATCH, 1, *(_SIZE,) * 3), generator=g).to(device)
    target = torch.cat([blobs(g, _CLASSES, (_SIZE,) * 3) for _ in range(_BATCH)]).to(device)
    band = sk.boundary_band(target)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "sure_kernels": lambda z: sk.supervised_evidential_loss(z, target, image, band=band),
        "textbook": lambda z: sk.reference.supervised_evidential_loss(z, target, image, band=band),
    }
    found: dict[str, Any] = {"network": "MONAI UNet 16-32-64-128", "shape": [_BATCH, 1, *(_SIZE,) * 3]}
    for name, loss in losses.items():
        steps, parts = [], []
        for _ in range(_STEPS + 1):
            synchronise(device)
            began = time.perf_counter()
            logits = network(image)
            leaf = logits.detach().requires_grad_()
            synchronise(device)
            middle = time.perf_counter()
            loss(leaf).backward()
            synchronise(device)
            after = time.perf_counter()
            optimiser.zero_grad()
            logits.backward(leaf.grad)
            optimiser.step()
            synchronise(device)
            steps.append(time.perf_counter() - began)
            parts.append(after - middle)
        step, part = statistics.median(steps[1:]), statistics.median(parts[1:])
        found[name] = {"step": step, "loss": part, "share": part / step}
    return found
