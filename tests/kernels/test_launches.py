"""What launchers hand to the kernels is what the compile check compiles: types, constants and warps, nothing else."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction, mangle_type

import sure_kernels as sk
from sure_kernels import metrics
from sure_kernels.compile_check import check
from sure_kernels.ops.dirichlet.reference import MEASURES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Numbers of which the check takes some: of maps, of classes beyond the unrolled ones, and sets of measures as bits.
SAMPLED = {"MAPS", "FLAGS", "CLASSES"}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def kinds(argument: Any) -> set[str]:
    """The compiler's types of a run-time argument, one, or those in a tuple."""
    return set().union(*map(kinds, argument)) if isinstance(argument, tuple) else {mangle_type(argument)}


class Launches:
    """Instead of running, kernels note their arguments."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], dict[str, set[Any]]] = {}

    def note(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        found = self.seen.setdefault((kernel.fn.__module__, kernel.fn.__name__), {})
        found.setdefault("num_warps", set()).add(given["num_warps"])
        pointers = set()
        for parameter in kernel.params:
            argument = given[parameter.name]
            if isinstance(argument, torch.Tensor):
                # One that is not read is stood in for by another.
                if argument.data_ptr() in pointers:
                    continue
                pointers.add(argument.data_ptr())
            values = {argument} if parameter.is_constexpr else kinds(argument)
            found.setdefault(parameter.name, set()).update(values)


@pytest.fixture
def launches(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(sys.modules["sure_kernels.backends"], "_interpreted", lambda: True)
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")  # results hold whatever the memory did
    # A plain function, so that it gets the kernel it is called on.
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: launches.note(kernel, *args, **options))
    with sk.backend("triton"):
        yield launches


def compiled(module: str) -> dict[tuple[str, str], dict[str, set[Any]]]:
    """What the check compiles, in the form of `Launches.seen`."""
    found: dict[tuple[str, str], dict[str, set[Any]]] = {}
    for job in check.jobs([module], ["sm_90"], full=True):
        cases = job.cases()
        arguments = cases.arguments(job.flags)
        of_kernel = found.setdefault((module, cases.name), {})
        of_kernel.setdefault("num_warps", set()).add(arguments.num_warps)
        for name, kind in arguments.types.items():
            widths = {"i32", "i64"} if kind == "int" else {kind} if isinstance(kind, str) else set(kind)
            of_kernel.setdefault(name, set()).update(widths)
        for name, value in arguments.constants.items():
            # Integers that are always 1 reach the launcher as integers.
            constant = next(p for p in cases.kernel.params if p.name == name).is_constexpr
            of_kernel.setdefault(name, set()).add(value if constant else "i32")
    return found


def held_to_cases(launches: Launches, *kernels: str) -> None:
    assert {name for _, name in launches.seen} == set(kernels)
    for module in {module for module, _ in launches.seen}:
        listed = compiled(module)
        for (where, kernel), arguments in launches.seen.items():
            if where != module:
                continue
            for name in arguments.keys() - SAMPLED:
                values = {v for v in arguments[name] if not (name == "K" and isinstance(v, int) and v > 32)}
                missing = values - listed[where, kernel][name]
                assert not missing, f"{where} {kernel}: {name} = {missing} is launched, never compiled"


def volumes(k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    found = [random(2, k, 6, 5, 7, dtype=dtype), random(2, k, 9, 8, dtype=dtype)]
    last = [torch.channels_last_3d, torch.channels_last]
    return found + [x.contiguous(memory_format=form) for x, form in zip(found, last, strict=True)]


def backward(result: torch.Tensor) -> None:
    result.sum().backward()


@pytest.mark.parametrize("k", [3, 12, 40])
def test_evidential_losses(launches, k):
    for i, dtype in enumerate(DTYPES):
        for z in volumes(k, dtype):
            n, _, *spatial = z.shape
            labels = LABELS if i == 0 else LABELS[i : i + 1]
            for label in labels:
                y = random(n, *spatial).mul(k).to(label)
                backward(sk.evidential_loss(z.requires_grad_(), y))
                backward(sk.evidential_loss(z, y, kind="mse", mask=y > 0, prior=0.5, class_weight=[1.0] * k))
                backward(sk.evidential_loss(z, y, evidence="exp", ignore_index=0, compat="official"))
            for image in (random(n, 1, *spatial, dtype=dtype), random(n, 3, *spatial)):
                backward(sk.supervised_evidential_loss(z, y, image))
    sweeps = ("many_sums_kernel", "many_gradient_kernel") if k > 32 else ("sums_kernel", "gradient_kernel")
    more = ("_boundary_kernel", "_scan_kernel", "_min_plus_kernel", "reduce_kernel", "finalise_kernel")
    held_to_cases(launches, *sweeps, *more, *(("_sweep_kernel",) if k > 32 else ()))


@pytest.mark.parametrize("k", [3, 12, 40])
def test_dirichlet(launches, k):
    for dtype in DTYPES:
        for z in volumes(k, dtype):
            for measures in (MEASURES, ("vacuity",)):
                backward(sum(x.sum() for x in sk.dirichlet_uncertainty(z.requires_grad_(), measures=measures)))
    unrolled = ("forward_kernel", "backward_kernel") if k < 40 else ()
    # The dissonance is unrolled over fewer classes than the others.
    wide = ("forward_wide_kernel", "backward_wide_kernel") if k > 3 else ()
    held_to_cases(launches, *unrolled, *wide)


def test_gradient_magnitude(launches):
    for dtype in DTYPES:
        for channels in (1, 3):
            for image in volumes(channels, dtype):
                for reduction in ("l2", "max", "mean"):
                    backward(sk.gradient_magnitude(image.requires_grad_(), channel_reduction=reduction, eps=1))
    held_to_cases(launches, "_sweep_kernel", "_adjoint_kernel")


def test_boundary_distance(launches):
    for shape in ((2, 6, 5, 7), (2, 9, 130), (1, 3, 40, 2050)):
        for dtype in (*LABELS, torch.bool, torch.uint16, torch.uint32, torch.uint64):
            y = (random(*shape) > 0.5).to(dtype)
            sk.boundary_distance(y, max_distance=4, ignore_index=1)
            sk.boundary_distance(y, spacing=[1.1] * (len(shape) - 1))
            sk.boundary_band(y, spacing=[2] * (len(shape) - 1), near=3, far=40)
    held_to_cases(launches, "_boundary_kernel", "_scan_kernel", "_min_plus_kernel")


def test_ranking(launches):
    for n in (50, 20_000):
        for dtype in DTYPES:
            for scores in (*DTYPES, torch.float64):
                values = random(2, n, dtype=dtype).requires_grad_()
                backward(sk.pairwise_ranking_loss(values, random(2, n, dtype=scores)))
    levels = ("split_sums_kernel", "split_scan_kernel", "split_kernel")
    held_to_cases(launches, "pairs_kernel", "reduce_kernel", *levels)


def test_noise(launches):
    for dtype in DTYPES:
        for levels in (1, 2, 5):
            for mask in (None, random(2, 1, 6, 5, 7) > 0.3):
                for clean in (True, False):
                    maps = [
                        random(2, 1, 6, 5, 7, dtype=dtype).requires_grad_(clean or i > 0) for i in range(levels + 1)
                    ]
                    distance = random(2, 1, 6, 5, 7, dtype=dtype) * 8
                    at = (maps[0], maps[1:], random(levels, dtype=torch.float64), distance)
                    backward(sk.noise_uncertainty_loss(*at, near=3, mask=mask, weights=(1, 0, 1)))
    held_to_cases(launches, "sums_kernel", "gradient_kernel")


def test_histograms(launches):
    for dtype in DTYPES:
        for label in LABELS:
            y = random(2, 6, 5, 7).mul(3).to(label)
            p, u = random(2, 3, 6, 5, 7, dtype=dtype), random(2, 1, 6, 5, 7, dtype=dtype)
            for mask in (None, y > 0):
                metrics.segmentation_histograms(p, y, u, mask=mask)
    held_to_cases(launches, "counts_kernel", "reliability_kernel")


def test_every_kernel_is_launched_above():
    modules = map(importlib.import_module, check.kernel_modules())
    names = {cases.name for module in modules for cases in module.compile_cases()}
    swept = {"sums_kernel", "gradient_kernel", "many_sums_kernel", "many_gradient_kernel", "reduce_kernel"}
    measured = {"forward_kernel", "backward_kernel", "forward_wide_kernel", "backward_wide_kernel", "finalise_kernel"}
    filtered = {"_sweep_kernel", "_adjoint_kernel", "_boundary_kernel", "_scan_kernel", "_min_plus_kernel"}
    ranked = {"pairs_kernel", "split_sums_kernel", "split_scan_kernel", "split_kernel"}
    assert names == swept | measured | filtered | ranked | {"counts_kernel", "reliability_kernel"}
