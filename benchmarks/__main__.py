"""`python -m benchmarks [--size 96] [--device cpu] [--out FILE.json]`: time and memory of loss and gradient.

Every row is loss and gradient with respect to float32 logits of 4 classes: our op on the backend `auto` picks, the
textbook form (the reference under autograd), and MONAI's DiceCELoss as the price of an ordinary loss. Medians after a
warm-up; bytes kept for backward are unique storages seen by saved_tensors_hooks, in units of the logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor

import sure_kernels as sk
from sure_kernels.doctor import versions
from sure_kernels.registry import OPS

CLASSES = 4


def _gradient(function: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    leaf = args[0].detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        out = function(leaf, *args[1:], **kwargs)
        sum(v.sum() for v in ((out,) if isinstance(out, Tensor) else out)).backward()  # type: ignore[union-attr]

    return run


def _seconds(run: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return sorted(once() for _ in range(repeats))


def _kept(function: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> float:
    leaf = args[0].detach().requires_grad_()
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(leaf, *args[1:], **kwargs)
    del out
    return sum(seen.values()) / leaf.untyped_storage().nbytes()


def _monai(logits: Tensor, target: Tensor) -> Tensor:
    return DiceCELoss(to_onehot_y=True, softmax=True)(logits, target[:, None])


def rows(size: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row for every differentiable op and form of it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for op in OPS:
        if not op.differentiable:
            continue
        args, kwargs = op.example(generator, CLASSES, (size,) * 3, torch.float32)
        args = tuple(a.to(device) for a in args)
        if op.name == "supervised_evidential_loss":
            kwargs = kwargs | {"band": sk.boundary_band(args[1])}
        forms: dict[str, Callable[..., Any]] = {f"sure_kernels ({sk.get_backend(args[0])})": op.function}
        forms["textbook"] = op.reference
        if op.name == "evidential_loss":
            forms["MONAI DiceCELoss"] = _monai
        for name, function in forms.items():
            times = _seconds(_gradient(function, args, kwargs), device, repeats)
            found.append(
                {
                    "op": op.name,
                    "form": name,
                    "shape": list(args[0].shape),
                    "median_s": statistics.median(times),
                    "fastest_s": times[0],
                    "slowest_s": times[-1],
                    "kept_for_backward": _kept(function, args, kwargs),
                }
            )
    return found


def _machine(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        **versions("sure-kernels", "torch", "triton", "monai"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", type=int, default=96, help="voxels along each axis")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    result: dict[str, Any] = {"machine": _machine(device), "rows": rows(options.size, device, options.repeats)}
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None))
    print(f"{'op':28s} {'form':24s} {'median':>10s} {'kept for backward':>18s}")
    for row in result["rows"]:
        kept = f"{row['kept_for_backward']:.2f} x logits"
        print(f"{row['op']:28s} {row['form']:24s} {1e3 * row['median_s']:7.1f} ms {kept:>18s}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
