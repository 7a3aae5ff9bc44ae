"""`evidential_loss` in Triton against the reference in float64 and the published programs."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import HALF_TOLERANCE, LAYOUTS, far_apart, laid_out, largest_error
from loss_cases import IGNORED, INTEGERS, case, compare, evaluate
from tolerances import FLOAT32_GRADIENT, FLOAT32_GRADIENT_LARGE, GOLDEN_FLOAT32, GOLDEN_GRADIENT

import sure_kernels as sk
from sure_kernels import schedules
from sure_kernels.functional import DICE_FORMS, KINDS
from sure_kernels.kernel_lib.special import EVIDENCE
from sure_kernels.ops.evidential import closed_form, kernel
from sure_kernels.ops.evidential import op as custom

pytestmark = pytest.mark.usefixtures("triton_backend")

LOSS = "evidential_loss"
PRIORS = {"unit": 1.0, "scalar": 1.7, "below one": 0.05, "vector": (0.01, 2.0, 1.0), "large": 60.0}


@pytest.fixture(params=["unrolled", "looped"])
def loops(request, monkeypatch):
    """Both kernels for the same classes."""
    if request.param == "looped":
        monkeypatch.setattr(kernel, "MOST_UNROLLED", 1)


@pytest.mark.usefixtures("poisoned_memory")
class TestValues:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("evidence", EVIDENCE)
    @pytest.mark.parametrize("prior", PRIORS)
    def test_formulas(self, kind, evidence, prior, device):
        logits, target, mask, *_ = case((2, 3, 3, 5, 7), device)
        tolerance = FLOAT32_GRADIENT_LARGE if prior == "large" else FLOAT32_GRADIENT
        compare(
            LOSS, logits, target, mask=mask, kind=kind, evidence=evidence, prior=PRIORS[prior],
            gradient_tolerance=tolerance,
        )  # fmt: skip

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("prior", PRIORS)
    def test_weights(self, kind, prior, loops, device):
        logits, target, *_ = case((2, 3, 4, 5), device)
        compare(
            LOSS, logits, target, kind=kind, prior=PRIORS[prior], compat="official", class_weight=(0.5, 2.0, 0.0),
            ace_weight=2.0, kl_weight=0.3, dice_weight=0.7,
        )  # fmt: skip

    @pytest.mark.parametrize("dice", DICE_FORMS)
    @pytest.mark.parametrize("include_background", [True, False])
    def test_dice(self, dice, include_background, device):
        logits, target, *_ = case((2, 3, 4, 5), device)
        compare(LOSS, logits, target, dice=dice, include_background=include_background)

    @pytest.mark.parametrize("k", [2, 5, 8, 9, 16, 31, 32, 33])
    def test_classes(self, k, device):
        """On both sides of the bounds between block sizes and between unrolled and looping sweeps."""
        logits, target, *_ = case((1, k, 3, 5), device)
        compare(LOSS, logits, target)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, loops, device, monkeypatch):
        """Over several blocks, of which a program takes several."""
        monkeypatch.setattr(kernel, "block_size", lambda k, gradient: 16)
        monkeypatch.setattr(kernel, "_MANY_BLOCK", 16)
        monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", 3)
        logits, target, *_ = case((2, 3, 3, 4, 5), device)
        compare(LOSS, laid_out(logits, layout), target)

    @pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 2, 1, 1, 1), (1, 3, 17, 19)])
    def test_shapes(self, shape, device):
        logits, target, *_ = case(shape, device, ignored=0.0)
        compare(LOSS, logits, target)

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_labels(self, dtype, device):
        """Any integer, not contiguous, with an ignored value that the type may not hold."""
        logits, target, *_ = case((2, 3, 4, 5), device)
        labels = target.clamp_min(0).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        compare(LOSS, logits, labels, ignore_index=1 if dtype.is_signed else IGNORED)

    @pytest.mark.parametrize("scale", [1e-4, 40.0, 2000.0])
    def test_huge_and_tiny_logits(self, scale, loops, device):
        logits, target, *_ = case((1, 3, 5, 5), device, scale=scale)
        compare(LOSS, logits, target, gradient_tolerance=FLOAT32_GRADIENT_LARGE)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        logits, target, *_ = case((2, 4, 3, 5), device)
        compare(LOSS, logits.to(dtype), target, gradient_tolerance=HALF_TOLERANCE[dtype])

    def test_labels_beyond_32_bits_are_no_class(self, loops, device, monkeypatch):
        """2^32 + 1 is not 1; any number outside the classes will do for comparison."""
        monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
        logits, target, *_ = case((2, 3, 4, 5), device)
        results = [evaluate(sk.evidential_loss, logits, target.masked_fill(target == 1, x)) for x in (2**32 + 1, -2)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_one_class_absent(self, device):
        logits, target, *_ = case((2, 3, 4, 5), device)
        target[target == 1] = 2
        compare(LOSS, logits, target)

    @pytest.mark.parametrize("rest", ["nothing", "one voxel"])
    def test_ignored(self, rest, loops, device):
        """Ignored voxels, NaN in them: exactly zero gradient, and with nothing else the loss is exactly 0."""
        logits, target, *_ = case((2, 3, 4, 5), device, ignored=0.0)
        target.fill_(IGNORED)
        if rest == "one voxel":
            target[1, 2, 3] = 2
        clean = logits.clone()
        counted = (target != IGNORED).unsqueeze(1).expand_as(logits)
        logits[~counted] = float("nan")
        compare(LOSS, logits, target)
        loss, _, gradient = evaluate(sk.evidential_loss, logits, target)
        assert int(gradient[~counted].count_nonzero()) == 0
        if rest == "nothing":
            assert float(loss) == 0
        else:
            assert torch.equal(gradient, evaluate(sk.evidential_loss, clean, target)[2])

    def test_loss_scaling_in_half_precision(self, device):
        """The factor of a gradient scaler reaches the coefficients before anything is rounded to float16."""
        logits, target, *_ = case((1, 4, 17, 19), device)
        half = logits.to(torch.float16)
        _, _, got = evaluate(sk.evidential_loss, half, target, upstream=65536.0)
        with sk.backend("reference"):
            _, _, expected = evaluate(sk.evidential_loss, half.double(), target, upstream=65536.0)
        assert float((got.double() - expected).norm() / expected.norm()) < 1e-3
        _, _, tiny = evaluate(sk.evidential_loss, half, target, upstream=2.0**-16)
        assert bool(torch.isfinite(tiny).all())

    def test_runs_repeat_to_the_bit(self, loops, device):
        logits, target, mask, *_ = case((2, 3, 17, 19), device)
        first, second = (evaluate(sk.evidential_loss, logits, target, mask=mask) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_partition(self, device, monkeypatch):
        """One program or many: the same to rounding; the same partition twice: the same to the bit."""
        logits, target, *_ = case((1, 3, 20, 30), device)
        results = []
        for programs in (1, 1, 2048):
            monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", programs)
            # Smaller than the programs are many: their sums take several rounds.
            monkeypatch.setattr(kernel, "_REDUCE_BLOCK", 2)
            results.append(evaluate(sk.evidential_loss, logits, target))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
        assert abs(float(results[0][0] - results[2][0])) <= 1e-6 * float(results[0][0])
        assert largest_error(results[0][2], results[2][2]) < 1e-6


class TestGolden:
    @pytest.mark.parametrize("file", ["01_edl_sure_0", "01_edl_sure_1"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("form", ["edl_loss", "edl_loss_a"])
    def test_sure(self, golden, file, kind, form, device):
        data = golden(file)
        row = len(data["epochs"]) - 2
        epoch = int(data["epochs"][row])
        weight = 1 - 0.01 ** (1 - epoch / data["total_epoch"])
        loss, terms, gradient = evaluate(
            sk.evidential_loss,
            data["logits"].float().to(device),
            data["labels"].to(device),
            upstream=1.0,
            kind=kind,
            ace_weight=1.0 if form == "edl_loss" else 10.0,
            kl_weight=schedules.kl_weight(epoch, data["annealing_steps"]),
            dice_weight=weight if form == "edl_loss" else 10.0,
            compat="official" if kind == "mse" else None,
        )
        expected = data[f"{form}_{kind}_ref64"][row].to(device)
        torch.testing.assert_close(
            torch.cat((loss.view(1), terms)).double(), expected, rtol=GOLDEN_FLOAT32, atol=GOLDEN_FLOAT32
        )
        assert largest_error(gradient, data[f"{form}_{kind}_grad"][row]) < GOLDEN_GRADIENT

    def test_kl(self, golden, device):
        """relu of concentration - 1 is the evidence itself."""
        data = golden("02_dice_kl")
        for concentration, prior, expected in (
            (data["alpha"], torch.ones(4), data["kl64"]),
            (data["prius_alpha"], data["prior"], data["prius_kl64"]),
        ):
            logits = (concentration.double() - prior.double()).float().T.reshape(1, 4, 500, 1)
            labels = data["labels"].view(1, 500, 1).to(device)
            options = {"evidence": "relu", "prior": prior, "compat": "official"}
            _, terms, _ = evaluate(sk.evidential_loss, logits.to(device), labels, **options)
            assert float(terms[1]) == pytest.approx(float(expected.mean()), rel=GOLDEN_FLOAT32)

    @pytest.mark.parametrize("has_prior", [False, True])
    @pytest.mark.parametrize("mse", [False, True])
    def test_prius(self, golden, has_prior, mse, device):
        data = golden("03_edl_prius")
        # Without the calibration term, which is not part of this loss.
        rows = (data["combo_coef_cu"] == 0) & (data["combo_mse"] == mse) & (data["combo_has_prior"] == has_prior)
        row = int(rows.nonzero()[0])
        epoch, kind = int(data["combo_epoch"][row]), "mse" if mse else "digamma"
        loss, _, gradient = evaluate(
            sk.evidential_loss,
            data["logits"].float().to(device),
            data["labels"].to(device),
            upstream=1.0,
            kind=kind,
            prior=data["prior"] if has_prior else 1.0,
            kl_weight=schedules.kl_weight(epoch, 20),
            dice_weight=1 - 0.01 ** (1 - epoch / 100),
            compat="official" if has_prior or kind == "mse" else None,
        )
        assert abs(float(loss) / float(data["out64"][row][0]) - 1) < GOLDEN_FLOAT32
        assert largest_error(gradient, data["grad"][row]) < GOLDEN_GRADIENT


def test_channels_last_gradients_stay_channels_last(device):
    logits, target, *_ = case((2, 3, 3, 4, 5), device)
    logits = laid_out(logits, "channels_last")
    assert evaluate(sk.evidential_loss, logits, target)[2].stride() == logits.stride()


def test_offsets_past_two_to_the_31(loops, device):
    logits, target, *_ = case((2, 3, 3, 4), device)
    near = logits.to(torch.bfloat16)
    far = far_apart(near)
    assert far.stride(0) > 2**31
    for a, b in zip(evaluate(sk.evidential_loss, far, target), evaluate(sk.evidential_loss, near, target), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dice", DICE_FORMS)
def test_finalise_in_one_launch(weighted, dice, device):
    """Against the closed form, from the same sums; also with more images than a block."""
    k = 3
    formula = closed_form.Formula("digamma", "softplus", (1.0,) * k, (0.5, 2.0, 1.0) if weighted else (), False)
    weights = closed_form.Weights(1.5, 0.2, 0.7, dice, include_background=False)
    sums = torch.rand((19, closed_form.number_of_sums(k, False)), dtype=torch.float64).to(device) + 1
    sums[:, 4 + k : 4 + 2 * k] += 2
    got = kernel.finalise(sums, formula, weights)
    expected = closed_form.finalise(sums.sum(0), formula, weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.view(-1).double(), b.view(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_custom_ops_are_well_formed(layout, device):
    logits, target, mask, *_ = case((2, 3, 4, 5), device)
    logits = laid_out(logits, layout)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    formula = ("digamma", "softplus", [1.0] * 3, [], False)
    labels = (target, mask, IGNORED)
    torch.library.opcheck(custom.evidential_sums.op, (logits, *labels, *formula, "triton"), test_utils=checks)
    weights = (1.0, 1.0, 1.0, "soft", True)
    torch.library.opcheck(custom.evidential_forward.op, (logits, *labels, *weights, *formula), test_utils=checks)
    _, _, row = custom.evidential_forward(logits, *labels, *weights, *formula)
    up = torch.ones((), device=device)
    torch.library.opcheck(
        custom.evidential_gradient.op, (logits, *labels, row, up, *formula, "triton"), test_utils=checks
    )


def test_full_graph(device):
    logits, target, mask, *_ = case((1, 3, 4, 5), device)
    traced = torch.compile(sk.evidential_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        evaluate(traced, logits, target, mask=mask),
        evaluate(sk.evidential_loss, logits, target, mask=mask),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_backward_of_a_sum(device):
    """An upstream gradient of stride 0, and none for the terms."""
    logits, target, *_ = case((1, 3, 4, 5), device)
    leaf = logits.requires_grad_()
    loss, terms = sk.evidential_loss(leaf, target, return_terms=True)
    assert not any(t.requires_grad for t in terms)
    loss.expand(3).sum().backward()
    expected = evaluate(sk.evidential_loss, logits, target, upstream=3.0)[2]
    assert torch.equal(leaf.grad, expected)


def test_twice_in_one_graph(device):
    """Nothing is written into what came in."""
    logits, target, *_ = case((1, 3, 4, 5), device)
    before = logits.clone()
    leaf = logits.requires_grad_()
    (sk.evidential_loss(leaf, target) + sk.evidential_loss(leaf, target, kind="mse")).backward()
    parts = sum(evaluate(sk.evidential_loss, before, target, upstream=1.0, kind=k)[2] for k in ("digamma", "mse"))
    assert torch.equal(leaf.detach(), before)
    torch.testing.assert_close(leaf.grad, parts, rtol=1e-6, atol=1e-9)
