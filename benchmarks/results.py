"""Results: what a file of them holds, on which machine they were found, and when they may be recorded."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import copy_bandwidth
from sure.files import write_text
from sure_kernels.doctor import versions

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
SCHEMA = 1
_TIME = {"median": float, "fastest": float, "slowest": float}
# Fields of a row: (type, whether it may be missing). A row that was not run has `absent` and no measurement.
_ROW: dict[str, tuple[Any, bool]] = {
    "op": (str, False),
    "form": (str, False),
    "backend": (str, True),
    "sweep": (str, False),
    "shape": (list, False),
    "classes": (int, False),
    "dtype": (str, False),
    "absent": (str, True),
    "forward": (_TIME, True),
    "backward": (_TIME, True),
    "both": (_TIME, True),
    "repeats": (int, True),
    "kept": (float, True),
    "added": (float, True),
    "peak": (float, True),
    "bytes": (int, True),
    "gigabytes_per_second": (float, True),
    "share_of_copy": (float, True),
}
_MACHINE = ("date", "commit", "cpu", "threads", "gpu", "copy_bandwidth", "python", "torch")
_PACKAGES = ("torch", "triton", "numpy", "scipy", "monai", "exacta", "kornia", "edt", "torchmetrics")


def commit() -> str:
    """The commit that the files are of: BENCHMARKS_COMMIT, where a copy's HEAD is another one, else HEAD; - for none.

    Raises ValueError where the variable holds no hash.
    """
    named = os.environ.get("BENCHMARKS_COMMIT", "")
    if named:
        if not re.fullmatch("[0-9a-f]{7,40}", named):
            raise ValueError(f"BENCHMARKS_COMMIT: expected 7 to 40 hexadecimal digits, got {named!r}")
        return named[:7]
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return head.stdout.strip() or "-"


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    on_gpu = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "copy_bandwidth": copy_bandwidth(device),
        **versions("sure-kernels", *_PACKAGES),
    }


def check(results: dict[str, Any]) -> None:
    """ValueError, with the place, unless `results` has the form that a file of them must have."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"schema: expected {SCHEMA}, got {results.get('schema')!r}")
    for name in _MACHINE:
        if name not in results.get("machine", {}):
            raise ValueError(f"machine: {name} is missing")
    unknown = sorted(set(results) - {"schema", "machine", "rows", "training", "steps", "first_call", "host"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]}")
    if not isinstance(results.get("rows"), list):
        raise ValueError("rows: expected a list")
    for i, row in enumerate(results["rows"]):
        _check_fields(row, _ROW, f"rows[{i}]")
        if ("absent" in row) == ("both" in row):
            raise ValueError(f"rows[{i}]: expected either `both` or `absent`")


def _check_fields(found: dict[str, Any], fields: dict[str, tuple[Any, bool]], where: str) -> None:
    unknown = sorted(set(found) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]}")
    for name, (kind, optional) in fields.items():
        if name not in found:
            if not optional:
                raise ValueError(f"{where}: {name} is missing")
        elif isinstance(kind, dict):
            if not isinstance(found[name], dict):
                raise ValueError(f"{where}.{name}: expected an object, got {found[name]!r}")
            _check_fields(found[name], {key: (value, False) for key, value in kind.items()}, f"{where}.{name}")
        elif not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise ValueError(f"{where}.{name}: expected {kind.__name__}, got {found[name]!r}")


def voxels(row: dict[str, Any]) -> int:
    """Voxels, or points, of all images that a row was measured on."""
    n, *rest = row["shape"]
    return n * math.prod(rest if len(rest) in (1, 2) else rest[-3:])


def why_not_onto(found: dict[str, Any], device: torch.device) -> str | None:
    """Why results of this tree and machine may not be added to others."""
    here = machine(device)
    for name in here.keys() - {"date", "copy_bandwidth"}:
        if found["machine"].get(name) != here[name]:
            return f"{name}: expected {found['machine'].get(name)} as in the file, got {here[name]}"
    return None


def write(results: dict[str, Any], path: Path) -> None:
    check(results)
    write_text(path, json.dumps(results, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    results = json.loads(path.read_text(encoding="utf-8"))
    check(results)
    return results


def why_not_record() -> str | None:
    """Why results of this tree may not be recorded: changes that no commit holds, or red tests."""
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, cwd=ROOT, check=False)
    if status.returncode != 0:
        return "this is no git checkout"
    if status.stdout.strip():
        return f"the tree has changes that no commit holds:\n{status.stdout.rstrip()}"
    tests = subprocess.run([sys.executable, "-m", "pytest", "-x"], cwd=ROOT, check=False)
    return None if tests.returncode == 0 else "the tests are red"


def default_path(device: torch.device) -> Path:
    """One file for each kind of machine."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    else:
        name = f"cpu-{torch.get_num_threads()}-cores"
    return FOLDER / f"{name}.json"
