"""`python -m benchmarks.metrics [--size 256] [--out FILE.json]`: time and memory of the metrics, and histogram bounds.

One float32 volume of 4 classes whose labels are drawn from its probabilities. Rows are all calibration and
error-detection metrics from one pass, then each of them alone. Time is that of the wall and of the processor (which
other work on the machine changes less), memory the growth of the process's peak beyond the inputs.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sure_kernels import metrics
from sure_kernels.doctor import versions

CLASSES = 4


def volume(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probability, target, uncertainty and error, made plane by plane: no temporary hides the metrics' own memory."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.empty(1, CLASSES, size, size, size)
    target = torch.empty(1, size, size, size, dtype=torch.uint8)
    uncertainty = torch.empty(1, 1, size, size, size)
    error = torch.empty(1, size, size, size, dtype=torch.bool)
    for z in range(size):
        plane = (3 * torch.randn(1, CLASSES, size, size, generator=generator)).softmax(1)
        drawn = (torch.rand(1, 1, size, size, generator=generator) > plane.cumsum(1)).sum(1).clamp(max=CLASSES - 1)
        top = plane.max(1)
        probability[:, :, z], target[:, z] = plane, drawn
        uncertainty[:, 0, z], error[:, z] = 1 - top.values, top.indices != drawn
    return probability, target, uncertainty, error


def rows(size: int) -> list[dict[str, Any]]:
    probability, target, uncertainty, error = volume(size)
    of_p = (probability, target)
    calls: dict[str, Callable[[], Any]] = {
        "calibration_error_detection": lambda: metrics.calibration_error_detection(*of_p, uncertainty),
        "expected_calibration_error": lambda: metrics.expected_calibration_error(*of_p),
        "expected_calibration_error, per class": lambda: metrics.expected_calibration_error(*of_p, per_class=True),
        "adaptive_calibration_error": lambda: metrics.adaptive_calibration_error(*of_p),
        "adaptive_calibration_error, histogram": lambda: metrics.adaptive_calibration_error(*of_p, method="histogram"),
        "reliability_curve": lambda: metrics.reliability_curve(*of_p),
        "brier_score": lambda: metrics.brier_score(*of_p),
        "negative_log_likelihood": lambda: metrics.negative_log_likelihood(*of_p),
        "uncertainty_error_overlap": lambda: metrics.uncertainty_error_overlap(uncertainty, error),
        "error_detection_auroc": lambda: metrics.error_detection_auroc(uncertainty, error),
        "error_detection_auprc": lambda: metrics.error_detection_auprc(uncertainty, error),
        "area_under_risk_coverage": lambda: metrics.area_under_risk_coverage(uncertainty, error),
    }
    few = [t[..., :8, :8] for t in (probability, target, uncertainty)]
    metrics.calibration_error_detection(*few)
    metrics.adaptive_calibration_error(*few[:2])
    found = []
    for name, call in calls.items():
        before, began, worked = _peak(), time.perf_counter(), time.process_time()
        result = call()
        found.append(
            {
                "metric": name,
                "seconds": time.perf_counter() - began,
                "processor_seconds": time.process_time() - worked,
                "mebibytes": _peak() - before,
            }
        )
        if isinstance(result, metrics.SegmentationScores):
            found[-1]["ece"] = result.expected_calibration_error.item()
            found[-1]["auroc"] = result.error_detection_auroc.value.item()
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bounds(voxels: int = 100_000) -> list[dict[str, Any]]:
    """What histograms promise and keep, on maps crowded in different places."""
    torch.manual_seed(0)
    maps = {
        "uniform": torch.rand(voxels),
        "beta(0.3, 40)": torch.distributions.Beta(0.3, 40.0).sample((voxels,)),
        "1 - beta(0.3, 40)": 1 - torch.distributions.Beta(0.3, 40.0).sample((voxels,)),
        "entropy up to ln 4": 1.386 * torch.rand(voxels),
    }
    functions = (metrics.error_detection_auroc, metrics.error_detection_auprc, metrics.area_under_risk_coverage)
    found = []
    for name, u in maps.items():
        error = torch.rand(voxels) < 0.2 * u.argsort().argsort() / voxels
        for function in functions:
            value, bound = function(u, error, method="histogram")
            off = abs(value - function(u, error, method="exact"))
            found.append({"map": name, "metric": function.__name__, "bound": bound.item(), "off": off.item()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    machine = {"date": date.today().isoformat(), "threads": torch.get_num_threads(), **versions("torch")}
    result: dict[str, Any] = {"machine": machine, "rows": rows(options.size), "bounds": bounds()}
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    print(f"{f'{options.size}^3, {CLASSES} classes':40s} {'seconds':>8s} {'processor':>10s} {'beyond the inputs':>18s}")
    for row in result["rows"]:
        times = f"{row['seconds']:8.2f} {row['processor_seconds']:10.2f}"
        print(f"{row['metric']:40s} {times} {row['mebibytes']:14.1f} MiB")
    print(f"{'map':20s} {'metric':28s} {'bound':>9s} {'off by':>9s}")
    for row in result["bounds"]:
        print(f"{row['map']:20s} {row['metric']:28s} {row['bound']:9.1e} {row['off']:9.1e}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
