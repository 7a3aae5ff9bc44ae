"""`dirichlet_uncertainty` in Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import HALF_TOLERANCE, LAYOUTS, UPSTREAM, far_apart, laid_out, largest_error, with_gradient
from tolerances import FLOAT32_GRADIENT, FLOAT32_GRADIENT_LARGE, FLOAT32_VALUE, SMALL_DIFFERENCE

import sure_kernels as sk
from sure_kernels.kernel_lib.special import EVIDENCE
from sure_kernels.ops.dirichlet import kernel
from sure_kernels.ops.dirichlet import op as custom
from sure_kernels.ops.dirichlet.reference import MEASURES

pytestmark = pytest.mark.usefixtures("triton_backend")

PRIORS = {"unit": 1.0, "above one": 1.5, "below one": 0.01}


def logits(shape, device, scale=3.0, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def compare(x, kind="dense", tolerance=FLOAT32_GRADIENT, value_tolerance=FLOAT32_VALUE, **options):
    """Measures and gradient at `x` against the reference at the same values."""
    got, gradient = with_gradient(lambda t: sk.dirichlet_uncertainty(t, **options), x, kind)
    expected, expected_gradient = with_gradient(
        lambda t: sk.reference.dirichlet_uncertainty(t, **options), x.double(), kind
    )
    for name, a, b in zip(options["measures"], got, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        # The differential entropy has either sign: it may be 0 where its parts are about 1.
        least = 1.0 if name == "differential_entropy" else SMALL_DIFFERENCE
        assert largest_error(a, b, least) <= value_tolerance, name
    assert gradient.dtype == x.dtype
    # The same upstream gradient for all probabilities is none of the logits': what comes out is rounding.
    assert largest_error(gradient, expected_gradient, least=SMALL_DIFFERENCE) <= tolerance


@pytest.fixture(params=["unrolled", "wide"])
def loops(request, monkeypatch):
    """Both kernels for the same classes."""
    if request.param == "wide":
        monkeypatch.setattr(kernel, "is_wide", lambda k, flags: True)


@pytest.mark.usefixtures("poisoned_memory")
class TestValues:
    @pytest.mark.parametrize("evidence", EVIDENCE)
    @pytest.mark.parametrize("prior", PRIORS)
    def test_every_measure_together(self, evidence, prior, device):
        k = {"unit": 4, "above one": 2, "below one": 5}[prior]
        compare(logits((2, k, 3, 5), device), evidence=evidence, prior=PRIORS[prior], measures=MEASURES)

    def test_every_measure_in_loops_at_run_time(self, monkeypatch, device):
        monkeypatch.setattr(kernel, "is_wide", lambda k, flags: True)
        compare(logits((2, 4, 3, 5), device), prior=(0.3, 1.0, 2.0, 0.01), measures=MEASURES)

    @pytest.mark.parametrize("measure", MEASURES)
    def test_each_measure_alone(self, measure, loops, device):
        prior = (1.0, 0.3, 2.0)
        compare(logits((1, 3, 3, 2, 5), device), tolerance=FLOAT32_GRADIENT_LARGE, prior=prior, measures=(measure,))

    @pytest.mark.parametrize("k", [3, 8, 9, 16, 17])
    def test_classes(self, k, device):
        """On both sides of the bounds between unrolled and run-time loops."""
        measures = ("dissonance", "entropy") if k in (8, 9) else ("differential_entropy", "probability", "vacuity")
        compare(logits((1, k, 3, 3), device), measures=measures)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, device, monkeypatch):
        monkeypatch.setattr(kernel, "block_size", lambda k, pairs: 16)  # several blocks an image
        measures = ("vacuity", "probability", "entropy")
        compare(laid_out(logits((2, 3, 3, 4, 5), device), layout), measures=measures)

    @pytest.mark.parametrize("kind", UPSTREAM)
    def test_upstream_gradients(self, kind, device):
        compare(logits((2, 3, 3, 4), device), kind, measures=("vacuity", "probability"))

    @pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 2, 1, 1, 1), (2, 4, 17, 19)])
    def test_shapes(self, shape, device):
        compare(logits(shape, device), measures=("probability", "mutual_information"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        x = logits((1, 4, 3, 5), device).to(dtype)
        compare(x, tolerance=HALF_TOLERANCE[dtype], measures=("probability", "vacuity", "dissonance"))

    @pytest.mark.parametrize("scale", [1e-4, 40.0, 2000.0])
    def test_huge_and_tiny_logits(self, scale, device):
        x = logits((1, 3, 5, 5), device, scale)
        compare(x, tolerance=FLOAT32_GRADIENT_LARGE, measures=("probability", "vacuity", "dissonance", "entropy"))

    def test_no_evidence_at_all(self, loops, device):
        """0 / 0 in the dissonance is 0, and nothing is NaN."""
        x = torch.full((1, 3, 2, 2), -5.0, device=device)
        got, gradient = with_gradient(
            lambda t: sk.dirichlet_uncertainty(t, evidence="relu", measures=MEASURES), x, "dense"
        )
        assert all(bool(torch.isfinite(v).all()) for v in got)
        assert int(got[MEASURES.index("dissonance")].count_nonzero()) == 0
        assert int(gradient.count_nonzero()) == 0

    def test_equal_evidence(self, loops, device):
        """At the kink of |b_j - b_k| the derivative is that of the reference."""
        compare(torch.full((1, 3, 2, 2), 0.5, device=device), measures=("dissonance",))

    def test_runs_repeat_to_the_bit(self, device):
        x = logits((1, 4, 4, 5), device)
        first, second = (
            with_gradient(lambda t: sk.dirichlet_uncertainty(t, measures=MEASURES), x, "dense") for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
        assert torch.equal(first[1], second[1])

    def test_measures_without_a_gradient_cost_nothing(self, device, monkeypatch):
        used = []
        launch = kernel._launch
        monkeypatch.setattr(kernel, "_launch", lambda *args: used.append(args[-1]) or launch(*args))
        x = logits((1, 2, 3, 3), device).requires_grad_()
        sk.dirichlet_uncertainty(x, measures=MEASURES).entropy.sum().backward()
        assert used == [MEASURES, ("entropy",)]


def test_channels_last_gradients_stay_channels_last(device):
    x = laid_out(logits((1, 3, 4, 5), device), "channels_last").requires_grad_()
    (gradient,) = torch.autograd.grad(sk.dirichlet_uncertainty(x).vacuity.sum(), x)
    assert gradient.stride() == x.stride()


def test_offsets_past_two_to_the_31(device):
    x = logits((2, 3, 3, 4), device).to(torch.bfloat16)
    far = far_apart(x)
    assert far.stride(0) > 2**31
    for got, expected in zip(
        with_gradient(lambda t: sk.dirichlet_uncertainty(t), far, "dense"),
        with_gradient(lambda t: sk.dirichlet_uncertainty(t), x, "dense"),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_custom_ops_are_well_formed(layout, device):
    x = laid_out(logits((2, 3, 4, 5), device), layout)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    measures = "probability,entropy"
    options = ("softplus", [1.0] * 3, measures, "triton")
    torch.library.opcheck(custom.dirichlet_forward.op, (x, *options), test_utils=checks)
    grads = [torch.ones(2, c, 4, 5, device=device) for c in (3, 1)]
    torch.library.opcheck(custom.dirichlet_backward.op, (grads, x, *options), test_utils=checks)


def test_full_graph(device):
    x = logits((1, 3, 4, 5), device)
    compiled = torch.compile(sk.dirichlet_uncertainty, fullgraph=True, backend="aot_eager")
    eager = with_gradient(sk.dirichlet_uncertainty, x, "dense")
    traced = with_gradient(compiled, x, "dense")
    assert all(torch.equal(a, b) for a, b in zip(eager[0], traced[0], strict=True))
    assert torch.equal(eager[1], traced[1])
