"""Measure every form of every case at every size; results are written as they come."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sure_kernels as sk
from benchmarks import first_call, host, measure, results, steps, training
from benchmarks.registry import (
    CASES,
    COMPILED_AT,
    COMPILED_TEXTBOOK,
    EAGER,
    FUSED,
    OURS,
    QUICK,
    SETTINGS,
    Case,
    Function,
    Setting,
    case_of,
    forms_of,
    headlines_of,
)

# Bytes that a form may need at its peak, as a multiple of its first argument, before it is tried at all.
_ASSUMED_PEAK, _OUR_PEAK = 14, 4
# Voxels beyond which a CPU takes minutes for a rival.
_LARGEST_RIVAL = 256**3


def _row(case: Case, form: str, setting: Setting, args: tuple[Tensor, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": case.op,
        "form": form,
        "sweep": setting.sweep,
        "shape": list(args[0].shape),
        "classes": setting.classes,
        "dtype": str(args[0].dtype).removeprefix("torch."),
    }
    if form == OURS:
        row["backend"] = sk.get_backend(args[0], case.dispatched or case.op)
    return row


def _is_of(row: dict[str, Any], case: Case, setting: Setting) -> bool:
    """Whether a row was measured for this case at this size."""
    dtype = str(setting.dtype).removeprefix("torch.")
    return (
        (row["op"], row["sweep"], row["classes"]) == (case.op, setting.sweep, setting.classes)
        and row["dtype"] in (dtype, "int64")
        and results.voxels(row) == setting.batch * math.prod(setting.shape)
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 << 30
    return next(int(x.split()[1]) << 10 for x in info.read_text().splitlines() if x.startswith("MemAvailable"))


def _why_absent(case: Case, form: str, setting: Setting, args: tuple[Tensor, ...]) -> str | None:
    if form in (COMPILED_TEXTBOOK, FUSED) and setting not in (*COMPILED_AT, *QUICK):
        return "not run at this size: compiling takes minutes"
    voxels = args[0].numel() // (args[0].shape[1] if args[0].ndim > 2 else 1)
    on_gpu = args[0].device.type == "cuda"
    most = dict(case.most) if on_gpu else {**case.most, **case.most_on_cpu}
    if form != OURS and not on_gpu:
        most.setdefault(form, _LARGEST_RIVAL)
    if voxels > most.get(form, voxels):
        return f"not run beyond {most[form]} voxels"
    # Arithmetic is float32 whatever the logits are.
    if args[0].numel() * max(4, args[0].element_size()) * (
        _OUR_PEAK if form in (OURS, EAGER) else _ASSUMED_PEAK
    ) > _free_bytes(args[0].device):
        return "too large for this machine"
    return None


def measured(
    case: Case, function: Function, args: tuple[Tensor, ...], kwargs: dict[str, Any], bandwidth: float
) -> dict[str, Any]:
    """All measurements of one form."""
    found: dict[str, Any] = measure.times(function, args, kwargs, case.differentiable)
    if case.differentiable:
        found |= measure.kept(function, args, kwargs)
    found["peak"] = measure.peak(function, args, kwargs, case.differentiable)
    found["bytes"] = case.traffic(args)
    rate = found["bytes"] / found["both"]["median"]
    return found | {"gigabytes_per_second": rate / 1e9, "share_of_copy": rate / bandwidth}


def measure_all(
    device: torch.device,
    *,
    ops: Iterable[str] | None = None,
    quick: bool = False,
    largest: int | None = None,
    out: Path | None = None,
    budget: float | None = None,
    onto: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Results of all cases; `out` is rewritten after every row.

    Args:
        ops: public names; all where None.
        quick: two small sizes only.
        largest: voxels along an axis beyond which no size is run.
        budget: seconds after which no further size of an op is begun.
        onto: results of the same commit and machine, to which the sizes are added that they lack.
    """
    began = time.perf_counter()
    found: dict[str, Any] = onto or {"schema": results.SCHEMA, "machine": results.machine(device), "rows": []}
    if onto is None and not quick and ops is None:
        found["training"] = training.shares(device)
        found["steps"] = steps.seconds(device)
        if device.type == "cpu":
            found["first_call"] = first_call.seconds()
            if importlib.util.find_spec("triton") is not None:
                found["host"] = host.seconds()
    # The headlines, then the small ones of all ops first, so that a budget leaves out large volumes and no op.
    settings = sorted(QUICK if quick else SETTINGS, key=lambda s: s.batch * math.prod(s.shape))
    headlines = [s for s in headlines_of(found["machine"]) if s in settings]
    for setting in dict.fromkeys((*headlines, *settings)):
        for case in CASES:
            if ops is not None and case.op not in ops:
                continue
            if setting.sweep not in case.sweeps or max(setting.shape) > (largest or max(setting.shape)):
                continue
            if any(_is_of(row, case, setting) for row in found["rows"]):
                continue
            if budget is not None and time.perf_counter() - began > budget:
                return found
            args, kwargs = _arguments(case, setting, device)
            for form, load in forms_of(case, device.type == "cuda").items():
                row = _row(case, form, setting, args)
                reason = _why_absent(case, form, setting, args)
                if reason is None:
                    try:
                        row |= measured(case, load(), args, kwargs, found["machine"]["copy_bandwidth"])
                    except Exception as error:  # a rival that is missing or fails is a row that says so
                        if form == OURS:
                            raise
                        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
                if reason is not None:
                    row["absent"] = reason
                found["rows"].append(row)
                print(describe(row), flush=True)
                if out is not None:
                    results.write(found, out)
            del args, kwargs
    return found


def kernel_profile(device: torch.device, op: str, size: int, out: Path | None) -> str:
    """A table of what ours spends its time in, forward and backward; `out` gets the trace."""
    case = case_of(op)
    args, kwargs = _arguments(case, Setting("profile", 1, 4, (size,) * 3, torch.float32), device)
    measure.once(case.ours, args, kwargs, case.differentiable)  # compile, and fill caches
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        measure.once(case.ours, args, kwargs, case.differentiable)
        measure.synchronise(device)
    if out is not None:
        profile.export_chrome_trace(str(out))
    order = f"self_{device.type}_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)


def _arguments(case: Case, setting: Setting, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    args, kwargs = case.example(torch.Generator().manual_seed(0), setting)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return tuple(a.to(device) for a in args), moved


def describe(row: dict[str, Any]) -> str:
    """One line of a row."""
    form = f"{row['form']} ({row['backend']})" if "backend" in row else row["form"]
    size = "x".join(map(str, row["shape"]))
    line = f"{row['op']:32s} {form:40s} {size:>20s} {row['dtype']:9s}"
    if "absent" in row:
        return f"{line} absent: {row['absent']}"
    both = row["both"]
    text = f"{line} {1e3 * both['median']:9.2f} ms ({1e3 * both['fastest']:.2f} to {1e3 * both['slowest']:.2f})"
    if "kept" in row:
        text += f"  kept {row['kept']:.2f} (added {row['added']:.2f})"
    return text + f"  peak {row['peak']:.2f}  {row['gigabytes_per_second']:.1f} GB/s"
