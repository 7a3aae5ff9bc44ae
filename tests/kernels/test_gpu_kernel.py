"""What only a GPU can show: offsets past 2^31 for real, peak memory, CUDA graphs, streams, devices, time.

In the interpreter the same bodies run at tiny sizes, where graphs and streams are plain calls, so that their logic is
tested without a GPU. Elsewhere without one they are skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import sure_kernels as sk
from benchmarks import measure
from benchmarks.registry import CASES, Setting
from sure_kernels.kernel_lib.labels import FAR

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.skipif(
        not (ON_GPU or INTERPRETED), reason="no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1)"
    ),
    pytest.mark.usefixtures("triton_backend"),
]

# Voxels along an axis: of the volume past 2^31, of the one whose memory and time are measured, of all others.
HUGE, LARGE, SMALL = (512, 256, 48) if ON_GPU else (4, 8, 4)
CLASSES = 20 if ON_GPU else 3
OPS = Path(sk.__file__).parent / "ops"


class Inputs(NamedTuple):
    """Of every op, on one device."""

    logits: Tensor
    target: Tensor
    image: Tensor
    band: Tensor
    noisy: tuple[Tensor, Tensor, Tensor]
    levels: Tensor
    distance: Tensor


def inputs(device: str | torch.device, size: int = SMALL, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    spatial = (size,) * 3
    # Few, so that there are distances.
    sparse = torch.randint(1, 4, (2, *spatial), generator=g) * (torch.rand((2, *spatial), generator=g) < 0.03)
    made = Inputs(
        3 * torch.randn((2, 4, *spatial), generator=g),
        sparse.to(torch.uint8),
        torch.rand((2, 1, *spatial), generator=g),
        torch.randint(0, 4, (2, 1, *spatial), generator=g, dtype=torch.uint8),
        tuple(torch.rand((2, 1, *spatial), generator=g) for _ in range(3)),
        torch.rand((2, 2), generator=g),
        8 * torch.rand((2, 1, *spatial), generator=g),
    )
    return Inputs(*(tuple(x.to(device) for x in v) if isinstance(v, tuple) else v.to(device) for v in made))


def differentiated(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), *torch.autograd.grad(value.sum(), leaf)


# Every op with its backward: (name, function of the inputs).
RUNS: dict[str, Callable[[Inputs], Sequence[Tensor]]] = {
    "evidential_loss": lambda i: differentiated(lambda z: sk.evidential_loss(z, i.target), i.logits),
    "supervised_evidential_loss": lambda i: differentiated(
        lambda z: sk.supervised_evidential_loss(z, i.target, i.image, band=i.band), i.logits
    ),
    "dirichlet_uncertainty": lambda i: differentiated(lambda z: sk.dirichlet_uncertainty(z).vacuity, i.logits),
    "gradient_magnitude": lambda i: differentiated(sk.gradient_magnitude, i.image),
    "boundary_band": lambda i: (sk.boundary_band(i.target),),
    "boundary_distance": lambda i: (sk.boundary_distance(i.target, spacing=(1.0, 1.5, 2.0)),),
    "noise_uncertainty_loss": lambda i: differentiated(
        lambda u: sk.noise_uncertainty_loss(i.noisy[0], [u, i.noisy[2]], i.levels, i.distance, weights=(1.0, 0.0, 1.0)),
        i.noisy[1],
    ),
    "pairwise_ranking_loss": lambda i: differentiated(lambda u: sk.pairwise_ranking_loss(u, i.image), i.noisy[0]),
    "segmentation_histograms": lambda i: sk.metrics.segmentation_histograms(i.logits.softmax(1), i.target, i.noisy[0]),
}
# In the interpreter graphs, streams and devices are the same call once more: two ops show that the tests work.
NAMES = list(RUNS) if ON_GPU else ["evidential_loss", "boundary_band"]
# Those that a CUDA graph can hold: the sets of the ranking are laid out on the host.
CAPTURED = [name for name in NAMES if name != "pairwise_ranking_loss"]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def need_memory(device: str, size: int) -> None:
    """Skip where fewer than `size` bytes are free."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")


@pytest.fixture
def huge(device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """bfloat16 logits of 20 classes on 512^3 voxels, labels, image, and a band that is far throughout."""
    spatial = (HUGE,) * 3
    voxels = HUGE**3
    # Logits, their gradient, and what the ops make of them: the probability in float32 is the largest.
    need_memory(device, (2 + 2 + 4) * CLASSES * voxels + 16 * voxels)
    logits = torch.empty((1, CLASSES, *spatial), dtype=torch.bfloat16, device=device)
    for c in range(CLASSES):
        logits[:, c] = 3 * torch.randn((1, *spatial), device=device)
    assert not ON_GPU or logits.numel() > 2**31
    target = torch.randint(0, CLASSES, (1, *spatial), dtype=torch.uint8, device=device)
    image = torch.rand((1, 1, *spatial), dtype=torch.bfloat16, device=device)
    yield logits, target, image, torch.full((1, 1, *spatial), FAR, dtype=torch.uint8, device=device)
    if device == "cuda":
        torch.cuda.empty_cache()


class TestPastTwoToThe31:
    """A slab of the volume by itself must give the bits that the whole gives there: first planes, and last ones.

    Numbers of voxels are powers of two, so that means over them scale exactly.
    """

    SLABS = (slice(0, 2), slice(HUGE - 2, HUGE))

    @pytest.mark.parametrize("supervised", [False, True])
    def test_losses(self, supervised, huge):
        logits, target, image, band = huge

        def gradient(z, planes):
            leaf = z.detach().requires_grad_()
            # Dice alone would join the voxels of the slab with all others.
            if supervised:
                loss = sk.supervised_evidential_loss(
                    leaf, target[:, planes], image[:, :, planes], band=band[:, :, planes], dice_weight=0.0
                )
            else:
                loss = sk.evidential_loss(leaf, target[:, planes], dice_weight=0.0)
            (found,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, z[0, 0].numel()))
            return float(loss.detach()), found

        value, whole = gradient(logits, slice(None))
        # By the law of large numbers: each slab holds half a million voxels.
        for planes in self.SLABS:
            slab_value, slab = gradient(logits[:, :, planes].contiguous(), planes)
            assert torch.equal(whole[:, :, planes], slab)
            assert bool(slab.any())
            assert not ON_GPU or abs(slab_value / value - 1) < 0.05

    def test_dirichlet_uncertainty(self, huge):
        logits, *_ = huge
        leaf = logits.detach().requires_grad_()
        whole = sk.dirichlet_uncertainty(leaf, measures=("probability",)).probability
        (gradient,) = torch.autograd.grad(whole[:, -1].sum(), leaf)
        for planes in self.SLABS:
            part = logits[:, :, planes].contiguous().requires_grad_()
            slab = sk.dirichlet_uncertainty(part, measures=("probability",)).probability
            assert torch.equal(whole[:, :, planes], slab)
            assert torch.equal(gradient[:, :, planes], *torch.autograd.grad(slab[:, -1].sum(), part))

    def test_gradient_magnitude(self, huge):
        """The logits as an image of 20 channels."""
        image, *_ = huge
        with torch.no_grad():
            whole = sk.gradient_magnitude(image)
        for planes, inner in ((slice(0, 3), slice(0, 2)), (slice(HUGE - 3, HUGE), slice(1, 3))):
            slab = sk.gradient_magnitude(image[:, :, planes].contiguous())
            assert torch.equal(whole[:, :, planes][:, :, inner], slab[:, :, inner])


@pytest.mark.parametrize("supervised", [False, True])
def test_peak_memory(supervised, device):
    """Beyond the logits and their gradient a loss takes less than a hundredth of them, given the band."""
    i = inputs(device, LARGE)
    logits = i.logits.to(torch.bfloat16)

    def loss(z):
        return (
            sk.supervised_evidential_loss(z, i.target, i.image, band=i.band)
            if supervised
            else sk.evidential_loss(z, i.target)
        )

    # Tables and, of the first call, whatever stays.
    measure.once(loss, (logits,), {}, True)
    extra = measure.peak(loss, (logits,), {}, True) - 1
    # A few hundred voxels have more partial sums than a hundredth of their logits.
    assert 0 <= extra < (0.01 if ON_GPU else 1.0)


@pytest.mark.parametrize("name", RUNS)
def test_runs_repeat_to_the_bit(name, device):
    i = inputs(device)
    first = RUNS[name](i)
    for _ in range(3 if ON_GPU else 1):
        assert equal(RUNS[name](i), first)


def kernels() -> Iterator[tuple[str, object]]:
    """Every function of a kernel file that triton compiles."""
    for path in sorted(OPS.glob("*/kernel.py")):
        module = importlib.import_module(f"sure_kernels.ops.{path.parent.name}.kernel")
        for name, value in vars(module).items():
            if getattr(getattr(value, "fn", None), "__module__", None) == module.__name__:
                yield f"{path.parent.name}.{name}", value


def test_no_atomics(device):
    """Neither in the sources nor in what was compiled for this GPU."""
    for run in RUNS.values():
        run(inputs(device))
    found = dict(kernels())
    assert len(found) > 20
    compiled = 0
    for name, kernel in found.items():
        assert "atomic" not in inspect.getsource(kernel.fn), name
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            for binary in cache.values():
                compiled += 1
                assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
                assert not re.search(r"\b(atom|red)\.|_atomic_|\bds_add", assembly), name
    assert compiled > 0 or not ON_GPU


def captured(function: Callable[[Inputs], Sequence[Tensor]], static: Inputs) -> Callable[[], Sequence[Tensor]]:
    """`function` of `static` as a CUDA graph: what to call to replay it."""
    if static.logits.device.type != "cuda":
        return lambda: function(static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(static)

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return results

    return replay


@pytest.mark.skipif(not ON_GPU, reason="no GPU to record a graph")
@pytest.mark.parametrize("supervision", ["covariance", "exact"])
def test_recorded_by_inductor(supervision):
    """mode="reduce-overhead": the first call with these priors and weights is one that warms the graph up."""
    i = inputs("cuda")
    options = {"prior": [0.5, 1.0, 2.0, 3.0], "class_weight": [1.0, 2.0, 3.0, 4.0], "supervision": supervision}

    def loss(z: Tensor) -> Tensor:
        return sk.supervised_evidential_loss(2 * z, i.target, i.image, band=i.band, **options)

    recorded = torch.compile(loss, mode="reduce-overhead")
    for seed in range(4):
        z = inputs("cuda", seed=seed).logits
        got = [x.clone() for x in differentiated(recorded, z)]
        for a, b in zip(got, differentiated(loss, z), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CAPTURED)
def test_cuda_graph(name, device):
    """Captured once, replayed with other numbers in the same memory: nothing waits for the host, nothing is stale."""
    static, other = inputs(device), inputs(device, seed=1)
    replay = captured(RUNS[name], static)
    before = [x.clone() for x in replay()]
    assert equal(before, RUNS[name](inputs(device)))
    for old, new in zip(static, other, strict=True):
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (old, new)), strict=True):
            a.copy_(b)
    after = replay()
    assert equal(after, RUNS[name](other))
    assert not equal(after, before)


def side_stream(device: str) -> contextlib.AbstractContextManager:
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


@pytest.mark.parametrize("name", NAMES)
def test_other_streams(name, device):
    """On another stream, right behind the work there that makes the inputs."""
    expected = RUNS[name](inputs(device))
    measure.synchronise(torch.device(device))
    with side_stream(device):
        i = inputs(device)
        if device == "cuda":
            torch.cuda._sleep(20_000_000)
        i.logits.mul_(2).div_(2)
        got = RUNS[name](i)
    measure.synchronise(torch.device(device))
    assert equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_other_devices(name, device):
    """On a device that is not the current one."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = torch.device("cuda", 1) if device == "cuda" else torch.device(device)
    got = RUNS[name](inputs(other))
    assert all(x.device == other for x in got)
    assert equal([x.to(device) for x in got], RUNS[name](inputs(device)))


@pytest.mark.parametrize("case", [c for c in CASES if not c.op.startswith("metrics.")], ids=lambda c: c.op)
def test_times(case, device, monkeypatch):
    """Printed, not asserted: time of forward and backward beside that of the bytes they move; the goal is twice it."""
    if not ON_GPU:
        monkeypatch.setattr(measure, "_REPEATS", 1)
        monkeypatch.setattr(measure, "_COPIED", 1 << 20)
    setting = Setting("volume", 1, 4, (LARGE,) * 3, torch.bfloat16 if "evidential" in case.op else torch.float32)
    args, kwargs = case.example(torch.Generator().manual_seed(0), setting)
    args = tuple(x.to(device) for x in args)
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    seconds = measure.times(case.ours, args, kwargs, case.differentiable)["both"]["median"]
    floor = case.traffic(args) / measure.copy_bandwidth(torch.device(device))
    assert seconds > 0 < floor
    print(
        f"{case.op}, {LARGE}^3, {str(setting.dtype).removeprefix('torch.')}: {1e3 * seconds:.3f} ms, "
        f"{seconds / floor:.1f} times the floor of {1e3 * floor:.3f} ms"
    )
