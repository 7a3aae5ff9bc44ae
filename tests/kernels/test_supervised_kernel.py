"""`supervised_evidential_loss` in Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import HALF_TOLERANCE, LAYOUTS, far_apart, laid_out, largest_error
from loss_cases import IGNORED, INTEGERS, case, compare, evaluate, related

import sure_kernels as sk
from sure_kernels.functional import KINDS, RELATIONS
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES
from sure_kernels.ops.evidential import closed_form as evidential
from sure_kernels.ops.evidential import kernel as sweeps
from sure_kernels.ops.supervised import closed_form, kernel
from sure_kernels.ops.supervised import op as custom

pytestmark = pytest.mark.usefixtures("triton_backend")

LOSS = "supervised_evidential_loss"
FORMS = ("covariance", "correlation", "exact")
# Supervision outweighs the rest, so that its error is seen.
HEAVY = {"gradient_weight": 30.0, "far_weight": 10.0}


def active(shape, device, **options):
    """A case in which the covariance is positive."""
    _, target, mask, image, band = case(shape, device, **options)
    return related(image, band), target, mask, image, band


@pytest.mark.usefixtures("poisoned_memory")
class TestValues:
    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("padding_mode", PADDING_MODES)
    @pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 5)])
    def test_filters(self, operator, padding_mode, spatial, device):
        logits, target, mask, image, band = active((1, 3, *spatial), device)
        compare(
            LOSS, logits, target, image, mask=mask, band=band, operator=operator, padding_mode=padding_mode,
            spacing=(1.5, 0.7, 1.0)[: len(spatial)], relation="increasing", gradient_tolerance=4e-6, **HEAVY,
        )  # fmt: skip

    @pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 5)])
    @pytest.mark.parametrize("channel_reduction", CHANNEL_REDUCTIONS)
    def test_channels(self, spatial, channel_reduction, device):
        logits, target, _, image, band = active((1, 3, *spatial), device)
        image = torch.cat((image, image.flip(2), 2 * image.flip(3)), 1)
        for relation in RELATIONS:
            compare(
                LOSS, logits, target, image, band=band, channel_reduction=channel_reduction, relation=relation,
                gradient_tolerance=4e-6, **HEAVY,
            )  # fmt: skip

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("relation", RELATIONS)
    @pytest.mark.parametrize("cached", [False, True])
    def test_forms(self, form, relation, cached, device):
        logits, target, mask, image, band = active((3, 3, 3, 4, 5), device)
        source = {"gradient": sk.gradient_magnitude(image)} if cached else {}
        # The correlation is nearly 1 here, where its gradient is the difference of two equal parts.
        tolerance = 1e-4 if form == "correlation" else 4e-6
        options = {"supervision": form, "relation": relation, "mask": mask, "band": band, **source, **HEAVY}
        compare(LOSS, logits, target, None if cached else image, gradient_tolerance=tolerance, **options)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("prior", "class_weight"), [(1.0, (0.5, 2.0, 0.1)), ((0.01, 2.0, 1.0), None)])
    def test_formulas(self, kind, prior, class_weight, device):
        logits, target, mask, image, band = active((2, 3, 3, 4, 5), device)
        options = {"kind": kind, "prior": prior, "class_weight": class_weight, "mask": mask}
        compare(LOSS, logits, target, image, band=band, **options)

    @pytest.mark.parametrize("k", [2, 8, 9, 33])
    def test_classes(self, k, device):
        logits, target, _, image, band = case((1, k, 3, 4, 5), device)
        compare(LOSS, logits, target, image, band=band, value_tolerance=2e-6)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, device):
        """Of the logits and of all that goes with them."""
        logits, target, mask, image, band = case((2, 3, 3, 4, 5), device)
        target, mask = (laid_out(x.unsqueeze(1), "transposed").squeeze(1) for x in (target, mask))
        image, band = laid_out(image.double(), "transposed"), laid_out(band, "transposed")
        compare(LOSS, laid_out(logits, layout), target, image, mask=mask, band=band)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        logits, target, _, image, band = active((1, 3, 3, 4, 5), device)
        compare(LOSS, logits.to(dtype), target, image.to(dtype), band=band, gradient_tolerance=HALF_TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_labels(self, dtype, device):
        """Any integer, not contiguous, with an ignored value that the type may not hold."""
        logits, target, mask, image, band = active((1, 3, 3, 4, 5), device)
        labels = target.clamp_min(0).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        options = {"mask": mask, "band": band, "ignore_index": 1 if dtype.is_signed else IGNORED}
        compare(LOSS, logits, labels, image, **options, **HEAVY)

    def test_one_hot_labels(self, device):
        logits, target, mask, image, band = active((1, 3, 3, 4, 5), device, ignored=0.0)
        one_hot = target.unsqueeze(1) == torch.arange(3, device=device).view(1, 3, 1, 1, 1)
        expected = evaluate(sk.supervised_evidential_loss, logits, target, image, mask=mask, band=band)
        got = evaluate(sk.supervised_evidential_loss, logits, one_hot, image, mask=mask, band=band)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_band_from_labels(self, device):
        logits, _, _, image, _ = case((2, 3, 8, 9), device)
        target = torch.zeros((2, 8, 9), dtype=torch.uint8, device=device)
        target[:, 2:4, 2:4] = 2
        compare(LOSS, logits, target, image, near=1.5, far=2.0, **HEAVY)

    @pytest.mark.parametrize("bands", ["no boundary", "one boundary voxel", "no far", "all boundary"])
    def test_bands(self, bands, device):
        logits, target, _, image, band = active((2, 3, 3, 4, 5), device, ignored=0.0)
        band.fill_({"no far": 1, "all boundary": BOUNDARY}.get(bands, FAR))
        if bands == "one boundary voxel":
            band[0, 0, 1, 1, 1] = BOUNDARY
        compare(LOSS, logits, target, image, band=band, **HEAVY)

    @pytest.mark.parametrize("form", FORMS)
    def test_constant_volume(self, form, device):
        """Neither g nor u varies: no supervision, and no 0 / 0."""
        logits, target, _, image, band = case((1, 3, 3, 4, 5), device)
        logits, image = torch.full_like(logits, 0.5), torch.full_like(image, 7.0)
        compare(LOSS, logits, target, image, band=band, supervision=form, **HEAVY)

    @pytest.mark.parametrize("offset", [10.0, 1000.0])
    def test_moments_do_not_cancel(self, offset, device):
        """A gradient magnitude of small spread on a large mean."""
        logits, target, _, image, band = active((2, 3, 3, 4, 5), device)
        g = sk.gradient_magnitude(image) + offset
        compare(LOSS, logits, target, None, gradient=g, band=band, relation="increasing", value_tolerance=2e-6, **HEAVY)

    def test_ignored(self, device):
        """NaN logits, images and magnitudes in voxels that do not count."""
        logits, target, _, image, band = case((2, 3, 3, 4, 5), device, ignored=0.3)
        g = sk.gradient_magnitude(image)
        logits[(target == IGNORED).unsqueeze(1).expand_as(logits)] = float("nan")
        compare(LOSS, logits, target, None, gradient=torch.where(target.unsqueeze(1) == IGNORED, float("nan"), g),
                band=band)  # fmt: skip
        target.fill_(IGNORED)
        compare(LOSS, logits * float("nan"), target, image, band=band)

    @pytest.mark.parametrize("form", ["covariance", "correlation"])
    @pytest.mark.parametrize("cached", [False, True])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_magnitude_that_is_not_finite_shows(self, form, cached, bad, device, monkeypatch):
        """In the loss, as its gradient is not finite either."""
        monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
        logits, target, _, image, band = active((1, 3, 3, 4, 5), device)
        given = sk.gradient_magnitude(image) if cached else image
        given = given.clone()
        given[(band == BOUNDARY).nonzero()[0].unbind()] = bad
        options = {"supervision": form, "band": band, "gradient": given if cached else None}
        loss = sk.supervised_evidential_loss(logits, target, None if cached else given, **options)
        assert bool(loss.isnan())

    @pytest.mark.parametrize("reduction", ["l2", "max", "mean"])
    @pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 5)])
    @pytest.mark.parametrize("channels", [1, 2])
    def test_nan_in_one_channel_shows(self, reduction, spatial, channels, device, monkeypatch):
        """A GPU's maximum of a number and NaN is the number."""
        monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
        logits, target, _, image, band = active((1, 3, *spatial), device)
        image = torch.cat([image, *[torch.rand_like(image)] * (channels - 1)], 1)
        image[0, 0][(band[0, 0] == BOUNDARY).nonzero()[0].unbind()] = float("nan")
        loss = sk.supervised_evidential_loss(logits, target, image, band=band, channel_reduction=reduction)
        assert bool(loss.isnan())

    def test_marches_join(self, device, monkeypatch):
        """Wherever a march along z starts, it sees the same planes; planes too large for one are filtered alone."""
        logits, target, _, image, band = case((1, 3, 5, 4, 5), device)
        results = []
        for length, indices in ((5, 1 << 31), (2, 1 << 31), (5, 5 * 20), (5, 3 * 20)):
            monkeypatch.setattr(sweeps, "march_length", lambda voxels, depth, length=length: length)
            monkeypatch.setattr(sweeps, "_MARCH_INDICES", indices)
            results.append(evaluate(sk.supervised_evidential_loss, logits, target, image, band=band, **HEAVY))
        for loss, terms, gradient in results[1:]:
            torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
            torch.testing.assert_close(terms, results[0][1], rtol=1e-6, atol=1e-7)
            assert largest_error(gradient, results[0][2]) < 1e-6

    def test_runs_repeat_to_the_bit(self, device):
        logits, target, _, image, band = active((2, 3, 3, 4, 5), device)
        first, second = (evaluate(sk.supervised_evidential_loss, logits, target, image, band=band) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "spatial", [(700, 1 << 12, 1 << 11), (9, 1 << 14, 23170), (3, 1 << 15, 1 << 14), (2, 46340, 46340)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_marches_reach_what_32_bits_do(spatial, backward):
    formula = evidential.Formula("digamma", "softplus", (1.0, 1.0), (), False)
    filter_ = ("sobel", (1.0, 1.0, 1.0), "replicate", "l2")
    shape, strides = (1, 2, *spatial), (1,) * (7 if backward else 3)
    plan = sweeps._launch(backward, shape, strides, formula, False, -100, True, filter_, 1, torch.device("cpu"))
    _, plane, depth, march, *_ = plan.numbers
    tiles = -(-plane // plan.options["BLOCK"])
    assert plan.grid == (tiles * -(-depth // march), 1)
    if plan.options["GRADIENT"] == sweeps.MARCHED:
        assert (march + 1) * plane <= 2**31
    else:
        assert plane >= 2**29


def test_offsets_past_two_to_the_31(device):
    logits, target, _, image, band = case((2, 3, 3, 4, 5), device)
    near = logits.to(torch.bfloat16)
    for a, b in zip(
        evaluate(sk.supervised_evidential_loss, far_apart(near), target, image, band=band),
        evaluate(sk.supervised_evidential_loss, near, target, image, band=band),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["covariance", "correlation"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_finalise_in_one_launch(form, relation, device):
    """Against both closed forms, from the same sums; also with more images than a block."""
    k, images = 3, 19
    formula = evidential.Formula("digamma", "softplus", (1.0,) * k, (), False)
    weights = evidential.Weights(1.5, 0.2, 0.7, "adaptive_tversky", include_background=True)
    supervision = closed_form.Supervision(2.0, 0.5, form, relation, 0.3 if form == "correlation" else 0.0)
    generator = torch.Generator().manual_seed(0)
    g, u = (torch.rand((images, 9), generator=generator, dtype=torch.float64) for _ in range(2))
    g[0] = 0.7  # of which rounding leaves a variance of 1e-16
    moments = torch.stack(
        (
            torch.full((images,), 9.0),
            g.sum(1),
            (g * g).sum(1),
            u.sum(1),
            (u * g).sum(1),
            (u * u).sum(1),
            u[:, 0],
            u[:, 1],
        ),
        1,
    )
    base = torch.rand((images, evidential.number_of_sums(k, False)), generator=generator, dtype=torch.float64) + 1
    base[:, 4 + k : 4 + 2 * k] += 2
    sums = torch.cat((base, moments), 1).to(device)
    got = kernel.finalise(sums, formula, weights, supervision)
    first = evidential.finalise(sums.sum(0), formula, weights)
    second = closed_form.finalise(sums, supervision, None)
    expected = (
        first.loss + second.loss,
        torch.cat((first.terms, second.terms)),
        torch.cat((first.coefficients.expand(images, -1), second.coefficients), 1),
        second.means,
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_custom_ops_are_well_formed(layout, device):
    logits, target, mask, image, band = case((2, 3, 4, 5), device)
    logits, band = laid_out(logits, layout), band.squeeze(1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    formula = ("digamma", "softplus", [1.0] * 3, [], False)
    labels = (target, mask, band, IGNORED)
    source = (image, "sobel", [1.0, 1.0], "replicate", "l2", False)
    torch.library.opcheck(custom.supervised_sums.op, (logits, *labels, *source, *formula, "triton"), test_utils=checks)
    weights = (1.0, 1.0, "covariance", "decreasing", 0.0, 1.0, 1.0, 1.0, "soft", True)
    options = (logits, *labels, *source, *weights, *formula)
    torch.library.opcheck(custom.supervised_forward.op, options, test_utils=checks)
    _, _, rows, means = custom.supervised_forward(*options)
    up = torch.ones((), device=device)
    options = (logits, *labels, rows, means, up, *source, *formula, "triton")
    torch.library.opcheck(custom.supervised_gradient.op, options, test_utils=checks)


def test_full_graph(device):
    logits, target, mask, image, band = case((1, 3, 4, 5), device)
    traced = torch.compile(sk.supervised_evidential_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        evaluate(traced, logits, target, image, mask=mask, band=band),
        evaluate(sk.supervised_evidential_loss, logits, target, image, mask=mask, band=band),
        strict=True,
    ):
        assert torch.equal(a, b)
