"""A launch that is planned once hands the kernel what a launch through Triton's own dispatch does.

On a pretended GPU: kernels are compiled for it, what would be launched is noted.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import sure_kernels as sk
from sure_kernels.compile_check.offline import nvidia_usage
from sure_kernels.kernel_lib.launch import Launch, forget_plans
from sure_kernels.ops.evidential.closed_form import Formula, Weights, number_of_sums
from sure_kernels.ops.supervised import kernel
from sure_kernels.ops.supervised.closed_form import Supervision
from sure_kernels.registry import OPS
from tests.kernels import toy_kernels

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's caches belong to the GPU that is here"),
    pytest.mark.skipif(not hasattr(driver, "_active"), reason="this Triton keeps its driver elsewhere"),
]
PLANNED = (
    "gradient_magnitude",
    "dirichlet_uncertainty",
    "evidential_loss",
    "supervised_evidential_loss",
    "boundary_distance",
    "boundary_band",
)
Launched = tuple[tuple[int, ...], tuple[Any, ...]]


class PretendedGpu:
    """What compiling and launching ask a Triton driver for."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        name = metadata.name

        def note(*args: Any) -> None:
            # Grid, stream, function, metadata and hooks come before the kernel's own arguments.
            pointers: dict[int, int] = {}
            own = [
                ("tensor", a.dtype, pointers.setdefault(a.data_ptr(), len(pointers)))
                if isinstance(a, torch.Tensor)
                else a
                for a in args[9:]
            ]
            self.launches.append((name, args[:3], own))

        return note

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, words spilled and most threads."""
        registers, spilled = nvidia_usage(binary)
        return 1, 1, registers, spilled // 4, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


# One for all tests: Triton keeps what it compiled, and by whom it is launched.
PRETENDED = PretendedGpu()


@pytest.fixture
def gpu(monkeypatch):
    PRETENDED.launches.clear()
    monkeypatch.setattr(driver, "_active", PRETENDED)
    monkeypatch.setattr(sys.modules["sure_kernels.backends"], "_interpreted", lambda: True)
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")  # results hold whatever the memory did
    with sk.backend("triton"):
        yield PRETENDED


def test_repeated(gpu):
    x, out = torch.zeros(64), torch.zeros(64)
    launch = Launch(toy_kernels.sound, (2,), (1,), {"BLOCK": 32, "num_warps": 1})
    for _ in range(3):
        launch(x, out)
    assert gpu.launches == [("sound", (2, 1, 1), [*tensors(2), 1, 32])] * 3


def test_pointers_and_dtypes_are_told_apart(gpu, monkeypatch):
    """16 bytes' alignment is compiled in."""
    made = []
    run = type(toy_kernels.sound).run
    monkeypatch.setattr(type(toy_kernels.sound), "run", lambda *a, **k: made.append(run(*a, **k)) or made[-1])
    x, out = torch.zeros(68), torch.zeros(64)
    launch = Launch(toy_kernels.sound, (2,), (1,), {"BLOCK": 32, "num_warps": 1})
    for given in (x, x[1:], x[4:], x[1:], x.double(), x):
        launch(given, out)
    assert len(made) == len({id(kernel) for kernel in made}) == 3
    assert len(gpu.launches) == 6


@pytest.mark.parametrize("classes", [2, 4, 8])
def test_spills(gpu, classes, monkeypatch):
    """A kernel that spills is compiled again for the registers that it took, or a few more."""
    compiled = []
    run = type(toy_kernels.sound).run
    monkeypatch.setattr(type(toy_kernels.sound), "run", lambda *a, **k: compiled.append(run(*a, **k)) or compiled[-1])
    sums = torch.zeros(2, number_of_sums(classes, supervised=True), dtype=torch.float64)
    formula = Formula("digamma", "softplus", (1.0,) * classes, (), False)
    given = (
        sums,
        formula,
        Weights(1.0, 1.0, 1.0, "soft", False),
        Supervision(1.0, 1.0, "covariance", "decreasing", 0.0),
    )
    kernel.finalise(*given)
    *spilling, taken = compiled
    assert all(found.n_spills for found in spilling)
    assert taken.n_spills == 0
    number = len(gpu.launches)
    kernel.finalise(*given)
    assert len(compiled) == number == len(gpu.launches) - 1


def tensors(number: int) -> list[tuple[Any, ...]]:
    return [("tensor", torch.float32, i) for i in range(number)]


def call(op: Any, seed: int) -> None:
    args, kwargs = op.example(torch.Generator().manual_seed(seed), 3, (6, 5, 7), torch.float32)
    out = op.function(args[0].requires_grad_(op.differentiable), *args[1:], **kwargs)
    if not op.differentiable:
        return
    (out if isinstance(out, torch.Tensor) else sum(x.sum() for x in out)).sum().backward()


@pytest.mark.parametrize("op", [spec for spec in OPS if spec.name in PLANNED], ids=lambda spec: spec.name)
def test_ops(gpu, op, monkeypatch):
    """The second call, which Triton's dispatch does not see, launches what the first did."""
    dispatched = []
    run = type(toy_kernels.sound).run
    monkeypatch.setattr(type(toy_kernels.sound), "run", lambda *a, **k: dispatched.append(1) or run(*a, **k))
    forget_plans()
    call(op, 0)
    first = list(gpu.launches)
    gpu.launches.clear()
    assert len(dispatched) >= len(first) >= 2
    dispatched.clear()
    call(op, 1)
    assert gpu.launches == first
    assert not dispatched
