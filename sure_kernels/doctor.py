"""What works here: versions, devices, which backend serves what, and every op run once against its reference."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from sure_kernels.backends import AUTO, COMPILED, COMPILED_OPS, backend, backends, get_backend, requested, why_not
from sure_kernels.registry import OPS, OpSpec

_SHAPE = (11, 13, 12)
# float32 against float64 on volumes this small: a few units in the last place.
_TOLERANCE = 1e-5


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, "-" for packages that are not."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def devices() -> list[str]:
    """Names of the devices that tensors can live on."""
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return found


def check_op(op: OpSpec, device: str) -> float:
    """Largest relative difference of `op` and its gradient from the float64 reference on a small example."""
    args, kwargs = op.example(torch.Generator().manual_seed(0), 3, _SHAPE, torch.float32)
    low = [a.to(device) for a in args]
    high = [a.double() if a.is_floating_point() else a for a in args]
    if op.differentiable:
        low[0].requires_grad_()
        high[0].requires_grad_()
    got, expected = _tensors(op.function(*low, **kwargs)), _tensors(op.reference(*high, **kwargs))
    worst = max(_difference(a, b) for a, b in zip(got, expected, strict=True))
    if op.differentiable:
        sum(x.sum() for x in got).backward()  # type: ignore[union-attr]
        sum(x.sum() for x in expected).backward()  # type: ignore[union-attr]
        assert low[0].grad is not None
        assert high[0].grad is not None
        worst = max(worst, _difference(low[0].grad, high[0].grad))
    return worst


def _tensors(value: object) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)  # type: ignore[arg-type]


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return float("inf")
    scale = b[finite].abs().max().clamp_min(1e-12) if bool(finite.any()) else 1.0
    return float(((a - b)[finite].abs().max() if bool(finite.any()) else torch.tensor(0.0)) / scale)


def _rows() -> Iterator[tuple[OpSpec, str, str]]:
    """What is run: op, device, backend. Without a GPU also what `auto` compiles for large volumes on the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in ("cpu", *gpus):
        served = get_backend(torch.zeros(1, device=device))
        yield from ((op, device, served) for op in OPS)
    if not gpus and requested() == AUTO and why_not(COMPILED) is None:
        yield from ((op, "cpu", COMPILED) for op in OPS if op.name in COMPILED_OPS)


def doctor() -> int:
    """Print the findings; 0 when every op agrees with its reference on every device, else 1."""
    print("versions:", ", ".join(f"{k} {v}" for k, v in versions("sure-kernels", "torch", "triton").items()))
    print("devices:", ", ".join(devices()))
    print("backends:")
    for name, reason in backends().items():
        print(f"  {name:10s} {'available' if reason is None else 'no: ' + reason}")
    failures = 0
    print("ops against their reference in float64 (largest relative difference of value and gradient):")
    for op, device, name in _rows():
        try:
            with backend(name) if name == COMPILED else nullcontext():
                difference = check_op(op, device)
            good = difference <= _TOLERANCE
            outcome = f"{difference:.1e} {'ok' if good else 'WRONG'}"
        except Exception as error:  # the doctor reports whatever is wrong
            good, outcome = False, f"FAILED: {type(error).__name__}: {error}"
        failures += not good
        print(f"  {op.name:28s} {device:8s} {name:10s} {outcome}", flush=True)
    print("all well" if failures == 0 else f"{failures} ops are not well")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(doctor())
