"""The losses and Dirichlet measures: closed form against reference, invariants, edge cases, memory."""

from __future__ import annotations

import contextlib
import math

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from monai.losses import DiceLoss
from tolerances import (
    BFLOAT16,
    FLOAT16,
    FLOAT32_GRADIENT,
    FLOAT32_GRADIENT_LARGE,
    FLOAT32_VALUE,
    FLOAT32_VALUE_LARGE,
    FLOAT64_GRADIENT,
    FLOAT64_VALUE,
    FLOAT64_VALUE_LARGE,
    SMALL_DIFFERENCE,
)

import sure_kernels as sk
from sure_kernels.functional import DICE_FORMS, KINDS, RELATIONS
from sure_kernels.kernel_lib import special
from sure_kernels.kernel_lib.labels import BOUNDARY, counted_voxels
from sure_kernels.ops.dirichlet.reference import MEASURES

LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "strided")


def relaid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory layout."""
    if layout == "channels_last":
        form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=form)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[..., :1].expand_as(x)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


SMALL_PRIOR, LARGE_PRIOR = 0.01, 90.0


def loses_digits(logits, options):
    """Whether concentrations, or slopes of the order of 1 / prior, are large beside what comes out."""
    extreme = options["prior"] in (SMALL_PRIOR, LARGE_PRIOR)
    return extreme or options["evidence"] == "exp" or float(logits.abs().max()) > 30


@st.composite
def cases(draw):
    """Logits in float64, labels with ignored voxels, a mask, an image, and options of the loss."""
    dims = draw(st.integers(2, 3))
    shape = draw(st.tuples(*(st.integers(1, 7),) * dims))
    n, k = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 3.0, 12.0]))
    logits = scale * torch.randn((n, k, *shape), generator=generator, dtype=torch.float64)
    target = torch.randint(0, draw(st.integers(1, k)), (n, *shape), generator=generator)
    ignored = draw(st.sampled_from([0.0, 0.2, 1.0]))
    target[torch.rand(target.shape, generator=generator) < ignored] = -100
    mask = torch.rand(target.shape, generator=generator) < 0.8 if draw(st.booleans()) else None
    channels = draw(st.integers(1, 2))
    image = torch.randn((n, channels, *shape), generator=generator, dtype=torch.float64)
    prior = draw(st.sampled_from(["one", "small", "vector", "large"]))
    options = {
        "kind": draw(st.sampled_from(KINDS)),
        "evidence": draw(st.sampled_from(special.EVIDENCE)),
        "prior": {"one": 1.0, "small": SMALL_PRIOR, "large": LARGE_PRIOR, "vector": [0.3 + 0.4 * i for i in range(k)]}[
            prior
        ],
        "dice": draw(st.sampled_from(DICE_FORMS)),
        "class_weight": [1.0 + i for i in range(k)] if draw(st.booleans()) else None,
        "include_background": draw(st.booleans()),
        "compat": draw(st.sampled_from([None, "official"])),
        "kl_weight": 0.7,
        "mask": mask,
        "return_terms": True,
    }
    return logits, target, image, options


def run(namespace, logits, target, image, options, *, supervised=False, upstream=1.0):
    """(loss, terms, gradient), the last two as plain tensors in float64."""
    leaf = logits.detach().requires_grad_()
    if supervised:
        loss, terms = namespace.supervised_evidential_loss(leaf, target, image, boundary=1.0, **options)
    else:
        loss, terms = namespace.evidential_loss(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach().double(), torch.stack(tuple(terms)).double(), gradient


def assert_close(got, expected, value_tolerance, gradient_tolerance):
    assert float((got[0] - expected[0]).abs()) <= value_tolerance * max(1.0, float(expected[0].abs()))
    assert float((got[1] - expected[1]).abs().max()) <= value_tolerance * max(1.0, float(expected[1].abs().max()))
    # Where every voxel is certain gradients are differences of what is as large as a voxel's share of the loss.
    share = expected[2].shape[1] / expected[2].numel()
    scale = max(float(expected[2].abs().max()), SMALL_DIFFERENCE * share)
    assert float((got[2].double() - expected[2].double()).abs().max()) <= gradient_tolerance * scale


def undecided(logits, target, options):
    """Whether uncertainty is constant on an image's boundary: on which side of its hinge covariance is, is rounding."""
    (u,) = sk.reference.dirichlet_uncertainty(
        logits, evidence=options["evidence"], prior=options["prior"], measures=("vacuity",)
    )
    on = (sk.boundary_band(target, boundary=1.0) == BOUNDARY).view_as(u)
    on = on & counted_voxels(target, -100, options["mask"]).view_as(u)
    chosen = [values[where] for values, where in zip(u, on, strict=True) if bool(where.any())]
    return any(float(values.max() - values.min()) < 1e-9 for values in chosen)


@given(cases(), st.sampled_from(LAYOUTS), st.booleans())
def test_closed_form_is_the_reference(case, layout, supervised):
    logits, target, image, options = case
    if layout == "expanded":
        logits = logits[..., :1].expand_as(logits).contiguous()
    if supervised:
        options = options | {"relation": RELATIONS[logits.shape[1] % 2]}
        assume(not undecided(logits, target, options))
    expected = run(sk.reference, logits, target, image, options, supervised=supervised)
    double = run(sk, relaid(logits, layout), target, image, options, supervised=supervised)
    tolerance = FLOAT64_VALUE_LARGE if options["evidence"] == "exp" else FLOAT64_VALUE
    assert_close(double, expected, tolerance, FLOAT64_GRADIENT)
    single_logits = relaid(logits.float(), layout)
    expected = run(sk.reference, logits.float().double(), target, image, options, supervised=supervised)
    single = run(sk, single_logits, target, image.float(), options, supervised=supervised)
    large = loses_digits(logits, options)
    tolerance = FLOAT32_GRADIENT_LARGE if large or supervised else FLOAT32_GRADIENT
    value_tolerance = FLOAT32_VALUE_LARGE if options["prior"] == LARGE_PRIOR else FLOAT32_VALUE
    assert_close(single, expected, value_tolerance, tolerance)
    assert single[2].dtype == torch.float32


@pytest.mark.parametrize("supervision", ["covariance", "correlation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, supervision):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn((2, 4, 9, 8, 7), generator=g)).to(dtype)
    target = torch.randint(0, 4, (2, 9, 8, 7), generator=g)
    image = torch.randn((2, 1, 9, 8, 7), generator=g).to(dtype)
    options = {"return_terms": True, "supervision": supervision}
    # As a GradScaler would: without it most float16 gradients would be subnormal.
    upstream = 1.0 if dtype == torch.bfloat16 else 65536.0
    got = run(sk, logits, target, image, options, supervised=True, upstream=upstream)
    expected = run(sk.reference, logits.double(), target, image.double(), options, supervised=True, upstream=upstream)
    assert got[2].dtype == dtype
    assert_close(got, expected, FLOAT32_VALUE, BFLOAT16 if dtype == torch.bfloat16 else FLOAT16)


@given(cases())
def test_permuting_the_classes_changes_nothing(case):
    logits, target, image, options = case
    k = logits.shape[1]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    inverse = torch.argsort(order)
    options = options | {"include_background": True}
    permuted = dict(options)
    for name in ("prior", "class_weight"):
        if isinstance(options[name], list):
            permuted[name] = [options[name][i] for i in order.tolist()]
    moved = torch.where(target == -100, -100, inverse[target.clamp_min(0)])
    a = run(sk, logits, target, image, options)
    b = run(sk, logits[:, order], moved, image, permuted)
    assert_close((b[0], b[1], b[2][:, inverse]), a, FLOAT64_VALUE, FLOAT64_GRADIENT)


@given(cases(), st.integers(0, 2))
def test_mirroring_an_axis_changes_nothing(case, axis):
    logits, target, image, options = case
    axis = 2 + axis % (logits.ndim - 2)
    flipped = options | {"mask": None if options["mask"] is None else options["mask"].flip(axis - 1)}
    a = run(sk, logits, target, image, options, supervised=True)
    b = run(sk, logits.flip(axis), target.flip(axis - 1), image.flip(axis), flipped, supervised=True)
    assert_close((b[0], b[1], b[2].flip(axis)), a, FLOAT64_VALUE, 10 * FLOAT64_GRADIENT)


@given(cases())
def test_ignoring_a_voxel_is_deleting_it(case):
    logits, target, _, options = case
    _n, k = logits.shape[:2]
    columns, labels = logits.movedim(1, -1).reshape(-1, k), target.reshape(-1)
    keep = labels != -100
    if options["mask"] is not None:
        keep = keep & options["mask"].reshape(-1)
    a = run(sk, logits, target, None, options)
    assert bool((a[2].movedim(1, -1).reshape(-1, k)[~keep] == 0).all())
    if not bool(keep.any()):
        assert float(a[0]) == 0
        assert bool((a[2] == 0).all())
        return
    fewer = columns[keep].T.reshape(1, k, 1, -1)
    b = run(sk, fewer, labels[keep].reshape(1, 1, -1), None, options | {"mask": None})
    kept = a[2].movedim(1, -1).reshape(-1, k)[keep].T.reshape(1, k, 1, -1)
    assert_close((b[0], b[1], b[2]), (a[0], a[1], kept), FLOAT64_VALUE, FLOAT64_GRADIENT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_what_ignored_voxels_hold_does_not_matter(value):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 3, 5, 6), generator=g)
    target = torch.randint(0, 3, (2, 5, 6), generator=g)
    image = torch.randn((2, 1, 5, 6), generator=g)
    target[0, 1:3] = -100
    dirty = logits.clone()
    dirty[0, :, 1:3] = value
    options = {"return_terms": True, "prior": [0.5, 1.0, 2.0]}
    for namespace in (sk, sk.reference):
        for supervised in (False, True):
            a = run(namespace, logits, target, image, options, supervised=supervised)
            b = run(namespace, dirty, target, image, options, supervised=supervised)
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[2], b[2])
            assert bool((b[2][0, :, 1:3] == 0).all())


def test_non_finite_logits_that_count_are_named():
    logits = torch.zeros((1, 3, 4, 4))
    logits[0, 1, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"logits: expected finite values.*\(0, 2, 3\)"):
        sk.evidential_loss(logits, torch.zeros((1, 4, 4), dtype=torch.long))


@pytest.mark.parametrize("supervised", [False, True])
def test_nothing_counted_is_exactly_zero(supervised):
    logits = torch.randn((2, 4, 3, 5, 2))
    target = torch.full((2, 3, 5, 2), -100)
    image = torch.randn((2, 1, 3, 5, 2))
    for namespace in (sk, sk.reference):
        loss, terms, gradient = run(namespace, logits, target, image, {"return_terms": True}, supervised=supervised)
        assert float(loss) == 0
        assert bool((terms == 0).all())
        assert bool((gradient == 0).all())


def test_confident_and_right_beats_confident_and_wrong():
    target = torch.arange(3).view(1, 1, 3)
    right = torch.full((1, 3, 1, 3), -20.0)
    right[0, range(3), 0, range(3)] = 20.0
    losses = [float(sk.evidential_loss(z, target)) for z in (right, torch.zeros_like(right), right.roll(1, 1))]
    assert losses == sorted(losses)


@given(cases())
def test_soft_dice_is_monai_dice(case):
    logits, target, _, options = case
    options = options | {"dice": "soft", "mask": None, "class_weight": None, "compat": None}
    target = target.clamp_min(0)
    k = logits.shape[1]
    p = sk.dirichlet_uncertainty(logits, evidence=options["evidence"], prior=options["prior"]).probability
    expected = DiceLoss(include_background=options["include_background"], batch=True, to_onehot_y=True)(
        p, target[:, None]
    )
    _, terms, _ = run(sk, logits, target, None, options)
    # MONAI's one-hot is float32, and so is its sum over classes of fewer than k present.
    assert k >= 2
    assert abs(float(terms[2]) - float(expected)) < 1e-6


def test_one_hot_targets_are_index_maps():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 3, 4, 5), generator=g)
    target = torch.randint(0, 3, (2, 4, 5), generator=g)
    one_hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    expected = sk.evidential_loss(logits, target)
    for form in (
        one_hot,
        one_hot.float(),
        one_hot.bool(),
        target[:, None],
        target.to(torch.uint8),
        target.to(torch.uint16),
    ):
        assert torch.equal(sk.evidential_loss(logits, form), expected)
    with pytest.raises(ValueError, match="single 1"):
        sk.evidential_loss(logits, 2 * one_hot)


@given(cases(), st.permutations(MEASURES), st.sampled_from(LAYOUTS))
def test_dirichlet_measures_are_the_reference(case, measures, layout):
    logits, _, _, options = case
    options = {k: options[k] for k in ("evidence", "prior")}
    chosen = tuple(measures[: 1 + logits.shape[1] % len(MEASURES)])
    if layout == "expanded":
        logits = logits[..., :1].expand_as(logits).contiguous()
    g = torch.Generator().manual_seed(1)
    results = {}
    for namespace, dtype in ((sk.reference, torch.float64), (sk, torch.float64), (sk, torch.float32)):
        leaf = relaid(logits.float().to(dtype), layout).requires_grad_()
        out = namespace.dirichlet_uncertainty(leaf, measures=chosen, **options)
        assert out._fields == chosen
        g.manual_seed(1)
        total = sum((torch.randn(v.shape, generator=g, dtype=torch.float64).to(dtype) * v).sum() for v in out)
        (gradient,) = torch.autograd.grad(total, leaf)
        results[namespace, dtype] = ([v.detach().double() for v in out], gradient.double())
    expected, expected_gradient = results[sk.reference, torch.float64]
    large = loses_digits(logits, options)
    for dtype, value_tolerance, gradient_tolerance in (
        (torch.float64, 1e-10, 1e-8),
        (torch.float32, 2e-6, FLOAT32_GRADIENT_LARGE if large else FLOAT32_GRADIENT),
    ):
        values, gradient = results[sk, dtype]
        for got, want in zip(values, expected, strict=True):
            assert bool(((got - want).abs() <= value_tolerance * want.abs().clamp_min(1)).all())
        scale = max(float(expected_gradient.abs().max()), SMALL_DIFFERENCE)
        assert float((gradient - expected_gradient).abs().max()) <= gradient_tolerance * scale


@given(cases())
def test_dirichlet_invariants(case):
    logits, _, _, options = case
    out = sk.dirichlet_uncertainty(logits, evidence=options["evidence"], prior=options["prior"], measures=MEASURES)
    k = logits.shape[1]
    assert torch.allclose(out.probability.sum(1), torch.ones((), dtype=torch.float64))
    assert bool(((out.vacuity > 0) & (out.vacuity <= 1 + 1e-12)).all())
    assert bool((out.entropy <= math.log(k) + 1e-9).all())
    assert bool((out.mutual_information >= -1e-9).all())
    assert torch.allclose(out.entropy, out.expected_entropy + out.mutual_information, atol=1e-9)
    assert bool(((out.dissonance >= -1e-12) & (out.dissonance <= 1 + 1e-12)).all())
    more = sk.dirichlet_uncertainty(
        logits + 1, evidence=options["evidence"], prior=options["prior"], measures="vacuity"
    )
    assert bool((more.vacuity <= out.vacuity + 1e-12).all())


def test_differential_entropy_is_that_of_torch_distributions():
    logits = torch.randn((1, 4, 3, 3), dtype=torch.float64)
    got = sk.dirichlet_uncertainty(logits, measures=("differential_entropy",)).differential_entropy[:, 0]
    a = torch.nn.functional.softplus(logits).movedim(1, -1) + 1
    torch.testing.assert_close(got, torch.distributions.Dirichlet(a).entropy())


@pytest.mark.parametrize("below_one", [False, True])
def test_special_functions_against_mpmath(below_one):
    low = -3 if below_one else 0
    x = torch.logspace(low, 6, 400, dtype=torch.float64).float()
    gap = torch.logspace(-3, 4, 400, dtype=torch.float64).float().flip(0)
    b = 0.5
    psi = lambda v: float(mpmath.digamma(v))
    rows = [(float(v), float(d)) for v, d in zip(x, gap, strict=True)]
    expected = {
        "trigamma": [float(mpmath.polygamma(1, v)) for v, _ in rows],
        "difference": [psi(mpmath.mpf(v) + d) - psi(v) for v, d in rows],
        "kl_term": [float((v - b) * mpmath.digamma(v) - mpmath.loggamma(v) - (v - b)) for v, _ in rows],
        "slope": [float((v - b) * mpmath.polygamma(1, v) - 1) for v, _ in rows],
        "excess": [float(mpmath.digamma(mpmath.mpf(v) + 1) - mpmath.log(v)) for v, _ in rows],
        "excess_slope": [float(mpmath.polygamma(1, mpmath.mpf(v) + 1) - (not below_one) / v) for v, _ in rows],
    }
    got = {
        "trigamma": special.trigamma(x, below_one),
        "difference": special.digamma_difference(x, gap, below_one),
        "kl_term": special.kl_term(x, b, below_one),
        "slope": special.kl_term_slope(x, b, below_one),
        "excess": special.digamma_excess(x, below_one),
        "excess_slope": special.digamma_excess_slope(x, below_one),
    }
    for name, values in got.items():
        want = torch.tensor(expected[name], dtype=torch.float64)
        error = (values.double() - want).abs() / want.abs().clamp_min(1)
        assert float(error.max()) < 1e-6, name


@pytest.mark.parametrize(
    ("b", "below_one"),
    [(1e-3, True), (0.3, True), (40.0, True), (1.0, False), (2.0, False), (9.0, False), (400.0, False)],
)
def test_kl_keeps_its_digits_whatever_the_prior(b, below_one):
    """What lgamma of the prior is, or how near to each other two slopes are, costs nothing."""
    e = torch.cat((torch.zeros(1), torch.logspace(-4, 4, 200)))
    total, t = 3 * b, 2 * e
    x, s = (mpmath.mpf(v) for v in (b, total))
    share, slope = [], []
    for v, w in zip(map(mpmath.mpf, e.tolist()), map(mpmath.mpf, t.tolist()), strict=True):
        share.append(float(v * mpmath.psi(0, x + v) - mpmath.loggamma(x + v) + mpmath.loggamma(x) - v))
        slope.append(float(v * mpmath.psi(1, x + v) - w * mpmath.psi(1, s + w)))
    got = special.kl_share(e, special.concentration(b, below_one), below_one)
    expected = torch.tensor(share, dtype=torch.float64)
    assert float(((got - expected).abs() / expected.abs().clamp_min(1)).max()) < 1e-6
    got = special.kl_slope(e, b, special.slope_of_sum(t, total, below_one), below_one)
    expected = torch.tensor(slope, dtype=torch.float64)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-6


def live_bytes() -> int:
    """Bytes of all tensor storages alive, hidden ones included."""
    import gc

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # type(), not isinstance(): that would wake torch's deprecated lazy objects. Fakes of a compiler hold no memory.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            # Nor do those that a compiler made functional: their storages have no address.
            with contextlib.suppress(RuntimeError):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("supervised", "target_dtype", "k", "dtype"),
    [
        (False, torch.uint8, 4, torch.float32),
        (False, torch.int64, 4, torch.float32),
        (False, torch.int64, 2, torch.float32),
        (False, torch.int64, 4, torch.bfloat16),
        (True, torch.uint8, 4, torch.float32),
        (True, torch.int64, 4, torch.float32),
    ],
)
def test_memory_kept_for_backward(supervised, target_dtype, k, dtype):
    logits = torch.randn((1, k, 24, 24, 24), dtype=dtype, requires_grad=True)
    target = torch.randint(0, k, (1, 24, 24, 24)).to(target_dtype)
    image = torch.randn((1, 1, 24, 24, 24))
    saved: dict[int, int] = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    before = live_bytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if supervised:
            loss = sk.supervised_evidential_loss(logits, target, image)
        else:
            loss = sk.evidential_loss(logits, target)
    kept = live_bytes() - before
    unit = logits.untyped_storage().nbytes()
    own = {p: b for p, b in saved.items() if p != image.untyped_storage().data_ptr()}
    assert sum(own.values()) <= 1.1 * unit
    # The logits were alive before: what came on top is the small integers.
    assert kept <= 0.1 * unit
    loss.backward()
    assert logits.grad is not None


def test_textbook_form_keeps_many_times_the_logits():
    """What the closed form is measured against: the same hook sees autograd keep about eight times the logits."""
    logits = torch.randn((1, 4, 16, 16, 16), requires_grad=True)
    target = torch.randint(0, 4, (1, 16, 16, 16))
    saved: dict[int, int] = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sk.reference.evidential_loss(logits, target)
    assert sum(saved.values()) > 7 * logits.untyped_storage().nbytes()


@pytest.mark.parametrize("k", [62, 63, 70])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
def test_many_classes_in_every_integer_type(k, dtype):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn((1, k, 6, 7), generator=g)
    target = torch.randint(0, k, (1, 6, 7), generator=g)
    expected = run(sk.reference, logits.double(), target, None, {"return_terms": True})
    got = run(sk, logits, target.to(dtype), None, {"return_terms": True})
    assert_close(got, expected, FLOAT32_VALUE, FLOAT32_GRADIENT)


def test_ignore_index_that_the_label_type_cannot_hold():
    logits = torch.randn((1, 200, 4, 4), generator=torch.Generator().manual_seed(0))
    target = torch.full((1, 4, 4), 156, dtype=torch.uint8)  # -100 in eight bits
    for namespace in (sk, sk.reference):
        got = namespace.evidential_loss(logits, target)
        torch.testing.assert_close(got, namespace.evidential_loss(logits, target.long()))
        assert float(got) > 1
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 2\].*got \[156\]"):
        sk.evidential_loss(logits[:, :3], target)
    with pytest.raises(ValueError, match="ignore_index: expected a 64-bit integer"):
        sk.evidential_loss(logits, target, ignore_index=2**70)


def test_dissonance_of_huge_evidence():
    logits = torch.full((1, 3, 2, 2), 1e20)
    got = sk.dirichlet_uncertainty(logits, evidence="relu", measures="dissonance").dissonance
    torch.testing.assert_close(got, torch.ones_like(got))
