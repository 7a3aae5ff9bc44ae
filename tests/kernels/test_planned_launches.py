"""A launch that is planned once hands the kernel what a launch through Triton's own dispatch does.

On a pretended GPU: kernels are compiled for it, what would be launched is noted.
"""

from __future__ import annotations

import importlib
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel

import sure_kernels as sk
from sure_kernels.compile_check.pretended import PretendedGpu, pretended
from sure_kernels.kernel_lib import launch as launches
from sure_kernels.kernel_lib.launch import Launch, forget_plans
from sure_kernels.ops.evidential.closed_form import Formula, Weights, number_of_sums
from sure_kernels.ops.supervised import kernel
from sure_kernels.ops.supervised.closed_form import Supervision
from sure_kernels.registry import OPS
from tests.kernels import toy_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's caches belong to the GPU that is here")
PLANNED = (
    "gradient_magnitude",
    "dirichlet_uncertainty",
    "evidential_loss",
    "supervised_evidential_loss",
    "boundary_distance",
    "boundary_band",
)
Launched = tuple[tuple[int, ...], tuple[Any, ...]]


LAUNCHES: list[tuple[Any, ...]] = []


def note(name: str, grid: tuple[int, ...], args: tuple[Any, ...], types: list[Any]) -> None:
    pointers: dict[int, int] = {}
    own = []
    for argument, kind in zip(args, types, strict=True):
        if str(kind).startswith("*"):
            address = argument if isinstance(argument, int) else argument.data_ptr()
            argument = (kind, pointers.setdefault(address, len(pointers)))
        own.append(argument)
    LAUNCHES.append((name, grid, own))


GPU = PretendedGpu(note)


@pytest.fixture
def gpu(monkeypatch):
    LAUNCHES.clear()
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")  # results hold whatever the memory did
    with pretended(GPU):
        yield


def test_repeated(gpu):
    x, out = torch.zeros(64), torch.zeros(64)
    launch = Launch(toy_kernels.sound, (2,), (1,), {"BLOCK": 32, "num_warps": 1})
    for _ in range(3):
        launch(x, out)
    assert [("sound", (2, 1, 1), [*tensors(2), 1, 32])] * 3 == LAUNCHES


def test_every_plan_is_for_one_device():
    """What a plan launches again is loaded on the GPU that it was launched on first."""
    for op in OPS:
        importlib.import_module(f"sure_kernels.ops.{op.room}.kernel")
    plans = [kept.__wrapped__ for kept in launches._plans if kept.__module__.startswith("sure_kernels.ops.")]
    assert {plan.__module__.split(".")[2] for plan in plans} >= {
        "boundary_distance",
        "dirichlet",
        "evidential",
        "ranking",
    }
    for plan in plans:
        device = inspect.signature(plan).parameters.get("device")
        assert device is not None, f"{plan.__module__}.{plan.__name__} plans launches for any device"
        assert device.default is inspect.Parameter.empty


@pytest.mark.parametrize("who", ["nobody", "hook", "unknown version"])
def test_hooks(gpu, who, monkeypatch):
    """Triton tells its hooks of launches; where there is a hook, or its ways are not known, they are left to it."""
    told = []
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda *args: told.append(args))
    if who == "unknown version":
        monkeypatch.setattr(triton, "__version__", "9.0.1")
    x, out = torch.zeros(64), torch.zeros(64)
    launch = Launch(toy_kernels.sound, (2,), (1,), {"BLOCK": 32, "num_warps": 1})
    launch(x, out)
    told.clear()
    runtime, hook = triton.knobs.runtime, lambda metadata: None
    chain = hasattr(runtime.launch_enter_hook, "add")
    if who == "hook":
        if chain:
            monkeypatch.setattr(runtime.launch_enter_hook, "calls", [hook])
        else:
            monkeypatch.setattr(runtime, "launch_enter_hook", hook)
    launch(x, out)
    assert len(told) == (who != "nobody")
    monkeypatch.undo()
    assert len(LAUNCHES) == 2
    assert LAUNCHES[0] == LAUNCHES[1]


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
    assert len(LAUNCHES) == 6


def test_promised_kernels(gpu):
    """Triton's AsyncCompileMode hands out promises of compiled kernels."""
    promises = pytest.importorskip("triton.runtime._async_compile")
    x, out = torch.zeros(64), torch.zeros(64)
    launch = Launch(toy_kernels.sound, (2,), (1,), {"BLOCK": 16, "num_warps": 1})
    with ThreadPoolExecutor(1) as pool, promises.AsyncCompileMode(pool):
        launch(x, out)
    launch(x, out)
    assert len(LAUNCHES) == 2


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
    number = len(compiled)
    # Once, whatever was compiled: kernels may work in place.
    assert len(LAUNCHES) == 1
    kernel.finalise(*given)
    assert len(compiled) == number
    assert len(LAUNCHES) == 2


def tensors(number: int) -> list[tuple[Any, ...]]:
    return [("*fp32", i) for i in range(number)]


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
    first = list(LAUNCHES)
    LAUNCHES.clear()
    assert len(dispatched) >= len(first) >= 2
    dispatched.clear()
    call(op, 1)
    assert first == LAUNCHES
    assert not dispatched


class Seen(TorchDispatchMode):
    """Names of the ops within the block, but of those that launch nothing."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.names -= {"aten::detach", "aten::is_set_to", "aten::squeeze.dim"}


@pytest.mark.parametrize("name", ["evidential_loss", "supervised_evidential_loss"])
def test_backward_launches_nothing_else(gpu, name):
    """Of torch's own kernels only the one that fills the loss's gradient with 1."""
    (op,) = (op for op in OPS if op.name == name)
    args, kwargs = op.example(torch.Generator().manual_seed(0), 3, (6, 5, 7), torch.float32)
    loss = op.function(args[0].requires_grad_(), *args[1:], **kwargs)
    with Seen() as seen:
        loss.backward()
    own = "sure_kernels::" + name.removesuffix("_loss").removesuffix("_evidential") + "_gradient"
    assert seen.names - {"aten::ones_like"} == {own}


@pytest.mark.parametrize(("epoch", "name"), [(0, "evidential_loss"), (50, "supervised_evidential_loss")])
def test_modules_launch_nothing_else(gpu, epoch, name):
    """Also with weights of classes and a spacing on a GPU, which have been read when the module was made."""
    (op,) = (op for op in OPS if op.name == "supervised_evidential_loss")
    (logits, target, image), _ = op.example(torch.Generator().manual_seed(0), 3, (6, 5, 7), torch.float32)
    loss = sk.SURELoss(class_weight=torch.tensor([1.0, 2.0, 3.0]), prior=[1.0, 1.0, 2.0], spacing=torch.ones(3))
    loss.set_epoch(epoch)
    band = sk.boundary_band(target)
    with Seen() as seen:
        loss(logits.requires_grad_(), target, image=image, band=band)
    assert seen.names == {"sure_kernels::" + name}


def test_too_many_images(gpu):
    """More than a grid's axis takes: for another backend, which `auto` then chooses."""
    logits, target = torch.zeros(1 << 16, 2, 1, 1), torch.zeros(1 << 16, 1, 1, dtype=torch.uint8)
    for call_of in (lambda: sk.dirichlet_uncertainty(logits), lambda: sk.evidential_loss(logits, target)):
        with pytest.raises(sk.BackendUnavailableError, match="serve up to 65535 images, the tensor has 65536"):
            call_of()
    assert not LAUNCHES
    with sk.backend("auto"):
        sk.dirichlet_uncertainty(logits)
