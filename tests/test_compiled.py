"""The `compiled` backend: its formulas as the compiler reads them, its kernels, and what happens without a compiler.

Every flag goes through the formulas, which run here as the Python they are; Inductor, which takes seconds for each
kernel, gets a selection that covers each flag once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evidential import LAYOUTS, assert_close, cases, relaid, run
from tolerances import (
    BFLOAT16,
    FLOAT16,
    FLOAT32_GRADIENT,
    FLOAT32_GRADIENT_LARGE,
    FLOAT32_MAPS,
    FLOAT32_VALUE,
    FLOAT64_VALUE,
)

import sure_kernels as sk
from sure_kernels import metrics
from sure_kernels.backends import COMPILED_OPS, dispatch
from sure_kernels.functional import RELATIONS
from sure_kernels.kernel_lib import blocks, inductor, special
from sure_kernels.kernel_lib.chunks import BLOCK
from sure_kernels.kernel_lib.inductor import Kernel
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES
from sure_kernels.ops.dirichlet.reference import MEASURES
from sure_kernels.ops.evidential import closed_form as evidential
from sure_kernels.ops.gradient_magnitude import closed_form as gradient_magnitude
from sure_kernels.ops.histograms.op import binary_histogram
from sure_kernels.registry import OPS

# From here on `auto` compiles: the smallest logits of four classes.
LARGE = (1, 4, 64, 64, 64)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    reason = inductor.why_not()
    if reason is not None:
        pytest.skip(f"nothing can be compiled here: {reason}")


@contextlib.contextmanager
def as_python():
    """Run kernels as the functions they are made of, in the words these have for the compiler."""
    with pytest.MonkeyPatch.context() as patch, sk.backend("compiled"):
        patch.setattr(Kernel, "__call__", lambda kernel, *args: kernel.function(*args))
        for module in (special, evidential, gradient_magnitude):
            patch.setattr(module, "compiling", lambda: True)
        yield


@given(cases(), st.sampled_from(LAYOUTS), st.booleans())
def test_formulas_are_the_reference(case, layout, supervised):
    logits, target, image, options = case
    logits = logits.float()
    if layout == "expanded":
        logits = logits[..., :1].expand_as(logits).contiguous()
    if supervised:
        options = options | {"relation": RELATIONS[logits.shape[1] % 2]}
    expected = run(sk.reference, logits.double(), target, image, options, supervised=supervised)
    with as_python():
        got = run(sk, relaid(logits, layout), target, image.float(), options, supervised=supervised)
    large = options["evidence"] == "exp" or float(logits.abs().max()) > 30
    assert_close(got, expected, FLOAT32_VALUE, FLOAT32_GRADIENT_LARGE if large or supervised else FLOAT32_GRADIENT)
    assert got[2].dtype == torch.float32


@settings(max_examples=20)
@given(cases(), st.permutations(MEASURES), st.sampled_from(LAYOUTS))
def test_dirichlet_formulas_are_the_reference(case, measures, layout):
    logits, _, _, options = case
    options = {k: options[k] for k in ("evidence", "prior")}
    chosen = tuple(measures[: 1 + logits.shape[1] % len(MEASURES)])
    check_measures(as_python(), relaid(logits.float(), layout), chosen, options)


def check_measures(context, logits, measures, options):
    """Values and gradient of `measures` on the compiled backend against the reference in float64."""
    low, high = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    with context:
        got = sk.dirichlet_uncertainty(low, measures=measures, **options)
        weights = [torch.linspace(0.5, 1.5, v.numel(), dtype=torch.float64).view(v.shape) for v in got]
        sum((v * w.float()).sum() for v, w in zip(got, weights, strict=True)).backward()
    expected = sk.reference.dirichlet_uncertainty(high, measures=measures, **options)
    sum((v * w).sum() for v, w in zip(expected, weights, strict=True)).backward()
    for name, a, b in zip(measures, got, expected, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        assert float((a.detach() - b.detach()).abs().max()) <= FLOAT32_MAPS * scale, name
    tolerance = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}.get(logits.dtype, FLOAT32_MAPS)
    scale = max(float(high.grad.abs().max()), 1e-6)
    assert float((low.grad.double() - high.grad).abs().max()) <= tolerance * max(1.0, scale)
    assert low.grad.dtype == logits.dtype


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(1, 3),
    st.sampled_from(OPERATORS),
    st.sampled_from(PADDING_MODES),
    st.sampled_from(CHANNEL_REDUCTIONS),
    st.sampled_from([0.0, 0.1]),
)
def test_gradient_magnitude_formulas_are_the_reference(shape, channels, operator, padding, reduction, eps):
    image = torch.randn((2, channels, *shape), generator=torch.Generator().manual_seed(sum(shape)))
    options = {"operator": operator, "padding_mode": padding, "channel_reduction": reduction, "eps": eps}
    check_magnitude(as_python(), image, options | {"spacing": [1.0 + i / 2 for i in range(len(shape))]})


def check_magnitude(context, image, options):
    low, high = image.detach().requires_grad_(), image.detach().double().requires_grad_()
    upstream = torch.rand((image.shape[0], 1, *image.shape[2:]), dtype=torch.float64)
    with context:
        got = sk.gradient_magnitude(low, **options)
        got.backward(upstream.float())
    expected = sk.reference.gradient_magnitude(high, **options)
    expected.backward(upstream)
    for a, b in ((got.detach(), expected.detach()), (low.grad, high.grad)):
        assert float((a.double() - b).abs().max()) <= FLOAT32_MAPS * max(1.0, float(b.abs().max()))


def volume(k, shape=(2, 23, 21, 22), dtype=torch.float32):
    """Logits, labels with some ignored, image: no whole number of blocks, and two images."""
    g = torch.Generator().manual_seed(k)
    n, *spatial = shape
    logits = (3 * torch.randn((n, k, *spatial), generator=g)).to(dtype)
    target = torch.randint(0, k, shape, generator=g)
    target[torch.rand(shape, generator=g) < 0.1] = -100
    return logits, target, torch.randn((n, 1, *spatial), generator=g)


COVERING = {
    "unit prior": (2, torch.float32, False, {}),
    "small prior, weights, band": (
        3,
        torch.bfloat16,
        True,
        {"kind": "log", "evidence": "exp", "prior": [0.01, 0.5, 2.0], "class_weight": [1.0, 2.0, 0.5]},
    ),
    "large prior, published form": (
        2,
        torch.float16,
        True,
        {"kind": "mse", "evidence": "relu", "prior": [1.5, 3.0], "compat": "official", "supervision": "correlation"},
    ),
}


@pytest.mark.parametrize("name", COVERING)
def test_losses(name):
    k, dtype, supervised, options = COVERING[name]
    logits, target, image = volume(k, dtype=dtype)
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.9
    options = options | {"mask": mask, "return_terms": True}
    # As a GradScaler would: without it most float16 gradients would be subnormal.
    upstream = 65536.0 if dtype == torch.float16 else 1.0
    tolerance = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32_GRADIENT}[dtype]
    expected = run(sk.reference, logits.double(), target, image, options, supervised=supervised, upstream=upstream)
    with sk.backend("compiled"):
        got = run(sk, logits, target, image, options, supervised=supervised, upstream=upstream)
        again = run(sk, logits, target, image, options, supervised=supervised, upstream=upstream)
    assert_close(got, expected, FLOAT32_VALUE, tolerance)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert bool((got[2].movedim(1, -1)[(target == -100) | ~mask] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 96, 97), (1, 31, 33, 17), (2, 16, 32, 32)])
def test_layouts_and_sizes(layout, shape):
    """One kernel for all of them: a voxel, less than a block, two axes, primes, whole blocks."""
    logits, target, image = volume(2, shape)
    if layout == "expanded":
        logits = logits[..., :1].expand_as(logits).contiguous()
    options = {"return_terms": True}
    expected = run(sk.reference, logits.double(), target, image, options)
    with sk.backend("compiled"):
        got = run(sk, relaid(logits, layout), target, image, options)
    assert_close(got, expected, FLOAT32_VALUE, FLOAT32_GRADIENT)


def test_nothing_counted_is_exactly_zero():
    logits, target, image = volume(2)
    with sk.backend("compiled"):
        loss, terms, gradient = run(sk, logits * math.nan, torch.full_like(target, -100), image, {"return_terms": True})
    assert float(loss) == 0
    assert bool((terms == 0).all())
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("dims", [2, 3])
def test_histograms(dims):
    """Every part in one kernel, which serves volumes and slices, more than one slab of them."""
    logits, target, _ = volume(3, (2, 63, 51, 52)[: dims + 1])
    p = logits.softmax(1).to(torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    u = torch.rand((len(p), 1, *p.shape[2:]), generator=g)
    u[torch.rand(u.shape, generator=g) < 0.01] = math.nan
    p[:, 1][torch.rand(target.shape, generator=g) < 0.01] = math.nan
    mask = torch.rand(target.shape, generator=g) < 0.9
    names = ("reference", "compiled", "compiled")
    found = []
    for name in names:
        with sk.backend(name):
            found.append(metrics.segmentation_histograms(p, target, u, mask=mask))
    expected, got, again = found
    for a, b, c in zip(got, expected, again, strict=True):
        torch.testing.assert_close(a, b, rtol=FLOAT64_VALUE, atol=FLOAT64_VALUE)
        assert torch.equal(a, c)
    points = (u.flatten(1), (p.argmax(1) != target).flatten(1).unsqueeze(1), mask.flatten(1))
    for a, b in zip(*(binary_histogram(*points, name) for name in ("reference", "compiled")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dims", [2, 3])
def test_dirichlet_uncertainty(dims):
    """All measures in one kernel, which serves volumes and slices."""
    logits, _, _ = volume(3, (2, 23, 21, 22)[: dims + 1])
    check_measures(sk.backend("compiled"), logits, MEASURES, {"prior": [0.5, 1.0, 2.0]})


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 1, 9, 40, 23), {"spacing": (2.0, 1.0, 1.0), "padding_mode": "extrapolate"}),
        ((1, 1, 1, 4, 3), {"spacing": (2.0, 1.0, 0.5), "padding_mode": "reflect"}),
        ((2, 2, 61, 45), {"operator": "scharr", "channel_reduction": "max", "eps": 0.1}),
    ],
)
def test_gradient_magnitude(shape, options):
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check_magnitude(sk.backend("compiled"), image, options)


@pytest.mark.parametrize("formulas", ["eager", "compiled"])
def test_slabs_of_gradient_magnitude_fit_together(formulas, monkeypatch):
    """Slabs of two planes give what one slab gives."""
    from sure_kernels.ops.gradient_magnitude import compiled

    whole = gradient_magnitude.EAGER if formulas == "eager" else compiled._COMPILED
    image = torch.randn((1, 1, 11, 7, 5), generator=torch.Generator().manual_seed(0))
    upstream = torch.rand((1, 1, 11, 7, 5), generator=torch.Generator().manual_seed(1))
    for padding in PADDING_MODES:
        options = ("sobel", (1.0, 2.0, 1.0), padding, "l2", 0.0)
        results = []
        for part in (whole, whole._replace(slab=1)):
            g = gradient_magnitude.forward(image, *options, formulas=part)
            results.append((g, gradient_magnitude.backward(upstream, image, *options, formulas=part)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT32_MAPS)


def test_stride_0_upstream_gradients():
    logits, _, _ = volume(3, (1, 23, 21, 22))
    gradients = []
    for backend in ("compiled", "eager"):
        with sk.backend(backend):
            leaf = logits.clone().requires_grad_()
            out = sk.dirichlet_uncertainty(leaf, measures=MEASURES, prior=[0.5, 1.0, 2.0])
            sum(v.sum() for v in out).backward()
            gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


TWO_CLASSES = volume(2)


def loss_and_gradient():
    logits, target, _ = TWO_CLASSES
    with sk.backend("compiled"):
        leaf = logits.clone().requires_grad_()
        loss = sk.evidential_loss(leaf, target)
        loss.backward()
    return loss.detach(), leaf.grad


def test_threads_modes_and_dtypes_of_the_process():
    """Whatever the process is set to, the kernel is the same: nothing is compiled twice."""
    threads = torch.get_num_threads()
    expected = loss_and_gradient()
    logits, target, _ = TWO_CLASSES
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for a, b in zip(loss_and_gradient(), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(loss_and_gradient()[0], expected[0], rtol=0, atol=0)
        with torch.inference_mode(), sk.backend("compiled"):
            got = sk.evidential_loss(logits.clone(), target)
            torch.testing.assert_close(got, expected[0], rtol=0, atol=0)
        torch.set_default_dtype(torch.float64)
        torch.testing.assert_close(loss_and_gradient(), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def test_dynamo_forgets():
    """Kernels are compiled on their example again where torch.compile's own memory was cleared."""
    expected = loss_and_gradient()
    torch._dynamo.reset()
    for a, b in zip(loss_and_gradient(), expected, strict=True):
        assert torch.equal(a, b)


def test_inside_a_compiled_program():
    """A full graph around the op, with sizes that change from call to call."""
    compiled = torch.compile(sk.evidential_loss, fullgraph=True, backend="aot_eager")
    for shape in ((2, 23, 21, 22), (2, 40, 30, 20), (2, 30, 31, 11)):
        logits, target, _ = volume(2, shape)
        gradients = []
        for function in (sk.evidential_loss, compiled):
            with sk.backend("compiled"):
                leaf = logits.clone().requires_grad_()
                function(leaf, target).backward()
                gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("op", [op for op in OPS if op.name in COMPILED_OPS], ids=lambda op: op.name)
def test_custom_ops_are_sound(op):
    """torch's own checks of schema, fake and autograd registration."""
    from sure_kernels.ops.dirichlet.op import dirichlet_forward
    from sure_kernels.ops.evidential.op import evidential_sums
    from sure_kernels.ops.gradient_magnitude.op import gradient_magnitude_forward
    from sure_kernels.ops.histograms.op import segmentation_histograms
    from sure_kernels.ops.supervised.op import supervised_sums

    logits, _, image = volume(2, (1, 9, 8, 7))
    target = torch.zeros((1, 9, 8, 7), dtype=torch.int64)
    labels = torch.zeros((1, BLOCK // 2), dtype=torch.uint8)
    banded = torch.zeros((1, 9 * 8 * 7), dtype=torch.uint8)
    filter_ = ("sobel", [1.0, 1.0, 1.0], "replicate", "l2")
    formula = ("digamma", "softplus", [1.0, 1.0], [], False)
    samples = {
        "gradient_magnitude": (gradient_magnitude_forward, (image, *filter_, 0.0)),
        "dirichlet_uncertainty": (dirichlet_forward, (logits, "softplus", [1.0, 1.0], "vacuity")),
        "evidential_loss": (evidential_sums, (logits, labels, None, -100, *formula)),
        "supervised_evidential_loss": (
            supervised_sums,
            (logits, banded, None, None, -100, image, *filter_, False, *formula),
        ),
        "segmentation_histograms": (
            segmentation_histograms,
            (logits.softmax(1), target, None, None, -100, 10, True, True, True, True),
        ),
    }
    function, args = samples[op.name]
    with as_python():
        torch.library.opcheck(function.op, (*args, "compiled"))


class _Losses(torch.utils.data.Dataset):
    """The loss of a worker's own volume."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return loss_and_gradient()[0]


def test_forked_workers():
    """A worker inherits kernels, runs them with its one thread, and makes those that it lacks."""
    expected = loss_and_gradient()[0]
    loader = torch.utils.data.DataLoader(_Losses(), num_workers=1, multiprocessing_context="fork", timeout=120)
    (got,) = loader
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=0)


# auto


@pytest.mark.parametrize("op", COMPILED_OPS)
def test_auto_compiles_large_volumes_alone(op):
    n, k, *spatial = LARGE
    if op == "segmentation_histograms":  # not every step, but once a volume
        spatial[0] *= 4
    large = torch.empty((n, k, *spatial))
    assert sk.get_backend(large, op) == "compiled"
    assert dispatch(large, op) == "auto"
    smaller = large[:, :, 1:].contiguous()
    assert sk.get_backend(smaller, op) == dispatch(smaller, op) == "eager"
    assert sk.get_backend(large.double(), op) == "eager"
    assert sk.get_backend(torch.empty((n, 40, *spatial)), op) == "eager"
    assert sk.get_backend(large, "pairwise_ranking_loss") == "eager"


@pytest.mark.parametrize(
    ("tensor", "op", "reason"),
    [
        (torch.empty(LARGE, dtype=torch.float64), None, "compute in float32, the tensor is float64"),
        (torch.empty((1, 40, 2, 2)), None, "up to 32 channels, the tensor has 40"),
        (torch.empty(LARGE, device="meta"), None, "run on the CPU, the tensor is on meta"),
        (torch.empty(LARGE), "boundary_distance", "boundary_distance has no compiled kernels"),
    ],
)
def test_requests_that_cannot_be_met(tensor, op, reason):
    with sk.backend("compiled"):
        for ask in (sk.get_backend, dispatch):
            with pytest.raises(sk.BackendUnavailableError, match=f"backend 'compiled' cannot serve.*{reason}"):
                ask(tensor, op)


FALLBACK = """
import warnings, torch, sure_kernels as sk
target = torch.zeros(1, 64, 64, 64, dtype=torch.uint8)
logits = torch.linspace(-3, 3, 4 * 64**3).view(1, 4, 64, 64, 64)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    losses = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        loss = sk.evidential_loss(leaf, target)
        loss.backward()
        losses.append((loss.detach(), leaf.grad))
(warning,) = [w for w in seen if w.category is RuntimeWarning]
print(warning.message)
with sk.backend("eager"):
    leaf = logits.clone().requires_grad_()
    loss = sk.evidential_loss(leaf, target)
    loss.backward()
assert all(torch.equal(a, loss) and torch.equal(b, leaf.grad) for a, b in losses)
assert sk.get_backend(logits) == "eager"
try:
    with sk.backend("compiled"):
        sk.evidential_loss(logits, target)
except sk.BackendUnavailableError as error:
    print(error)
print(sk.backends()["compiled"])
"""


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"CXX": "/nonexistent/g++"}, "InvalidCxxCompiler"),
        ({"CXX": "broken"}, "g\\+\\+ ended with status 1: the compiler is out of order"),
        pytest.param({"TORCHINDUCTOR_CACHE_DIR": "/proc"}, "Error: .*/proc", marks=pytest.mark.slow),
        pytest.param({"TORCHDYNAMO_DISABLE": "1"}, "torch.compile is off", marks=pytest.mark.slow),
    ],
)
def test_without_a_compiler(setting, reason, tmp_path):
    """auto: the eager form, and one warning that says why. An explicit request: an error that says why."""
    if setting.get("CXX") == "broken":
        broken = tmp_path / "g++"
        broken.write_text(
            "#!/bin/sh\ncase $1 in --version|-v) exec g++ $1;; esac\n"
            "case $* in *print*) exec g++ $*;; esac\necho 'the compiler is out of order' >&2\nexit 1\n"
        )
        broken.chmod(0o755)
        setting = {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", FALLBACK], env=os.environ | setting, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.search(reason, line), line
    assert lines[0].startswith("sure_kernels: large volumes on the CPU take the slower eager form, because")
    assert lines[1].startswith("backend 'compiled' cannot serve this tensor:")


WARM = """
import torch, sure_kernels as sk
from torch._dynamo.utils import counters
logits, target = torch.randn(1, 2, 20, 20, 20).requires_grad_(), torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
with sk.backend("compiled"):
    sk.evidential_loss(logits, target).backward()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_another_process_finds_the_kernels():
    loss_and_gradient()
    result = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "0"]


def test_compiling_says_so_once(monkeypatch, caplog):
    """What takes long says what it is; what does not, and what comes after, only where someone listens."""
    monkeypatch.setattr(inductor, "_PATIENCE", 0.05)
    monkeypatch.setattr(inductor._State, "announced", False)
    caplog.set_level("INFO", logger="sure_kernels")
    for name in ("one", "two"):
        with inductor._announced(name):
            time.sleep(0.2)
    loud = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(loud) == 1
    assert "compiling kernels for the CPU (one)" in loud[0]
    assert [r.getMessage().split(" in ")[0] for r in caplog.records if r.levelname == "INFO"] == [
        "compiling one",
        "compiled one",
        "compiling two",
        "compiled two",
    ]


@given(st.integers(1, 700_000))
def test_blocks_cover_the_volume(v):
    spans = list(blocks.spans(v))
    assert spans[0].start == 0
    assert spans[-1].stop == v
    for a, b in itertools.pairwise(spans):
        assert a.stop == b.start
    for span in spans[:-1]:
        assert (span.stop - span.start) % BLOCK == 0
        assert span.stop - span.start >= blocks.LEAST * BLOCK


def test_failures_of_one_kernel_leave_the_others_alone():
    def impossible(x):
        return torch.linalg.no_such_function(x)

    kernel = Kernel("an impossible kernel", impossible, lambda: [inductor.example(64)])
    with pytest.raises(inductor.CompilerError, match=r"torch\.compile failed"):
        kernel(torch.zeros(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_and_gradient()
