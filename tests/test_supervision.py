"""The covariance form of the gradient supervision and the far term."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tolerances import FLOAT32_GRADIENT_LARGE, FLOAT32_VALUE, FLOAT64_GRADIENT, FLOAT64_VALUE

import sure_kernels as sk
from sure_kernels import schedules
from sure_kernels.kernel_lib.labels import BOUNDARY, FAR


def setting(seed=0, shape=(2, 3, 12, 14)):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    target[:, 3:8, 2:9] = 1
    target[:, 5:8, 6:9] = 2
    image = torch.randn((shape[0], 1, *shape[2:]), generator=g, dtype=torch.float64)
    return logits, target, image


FORMS = [("covariance", 0.0), ("correlation", 0.0), ("correlation", 0.3), ("correlation", 1.0)]


@pytest.mark.parametrize(("supervision", "margin"), FORMS)
@pytest.mark.parametrize("relation", ["decreasing", "increasing"])
def test_terms_are_their_definition(supervision, margin, relation):
    logits, target, image = setting()
    u = sk.dirichlet_uncertainty(logits).vacuity[:, 0]
    g = sk.gradient_magnitude(image)[:, 0]
    d = sk.boundary_distance(target)[:, 0].double()
    expected = []
    for i in range(2):
        pair = torch.stack((u[i][d[i] <= 1], g[i][d[i] <= 1]))
        cov = torch.cov(pair, correction=0)
        value = cov[0, 1] / cov[1, 1].sqrt() / (cov[0, 0].sqrt() if supervision == "correlation" else 1)
        expected.append(torch.relu((value if relation == "decreasing" else -value) + margin))
    options = {"supervision": supervision, "margin": margin, "relation": relation, "near": 2.0, "far": 3.0}
    _, terms = sk.supervised_evidential_loss(logits, target, image, return_terms=True, **options)
    torch.testing.assert_close(terms.gradient, torch.stack(expected).mean())
    torch.testing.assert_close(terms.far, u[d > 3].mean())
    assert float(terms.far) > 0


@pytest.mark.parametrize(("supervision", "margin"), FORMS)
@pytest.mark.parametrize("relation", ["decreasing", "increasing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forms_and_their_gradients_are_the_reference(supervision, margin, relation, dtype):
    logits, target, image = setting()
    options = {"supervision": supervision, "margin": margin, "relation": relation, "near": 2.0, "far": 3.0}
    options |= {"gradient_weight": 30.0, "far_weight": 3.0, "kl_weight": 0.2}
    results = []
    for namespace, precision in ((sk.reference, torch.float64), (sk, dtype)):
        leaf = logits.to(precision, copy=True).requires_grad_()
        loss = namespace.supervised_evidential_loss(leaf, target, image.to(precision), **options)
        results.append((loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()))
    double = dtype == torch.float64
    tolerances = (FLOAT64_VALUE, FLOAT64_GRADIENT) if double else (FLOAT32_VALUE, FLOAT32_GRADIENT_LARGE)
    for got, expected, tolerance in zip(results[1], results[0], tolerances, strict=True):
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("relation", ["decreasing", "increasing"])
def test_a_margin_goes_on_until_the_correlation_is_reached(relation):
    logits, target, image = setting()
    sign = 1 if relation == "decreasing" else -1
    g, on = sk.gradient_magnitude(image), sk.boundary_distance(target) <= 1
    options = {"supervision": "correlation", "margin": 0.4, "relation": relation, "far_weight": 0.0}
    options |= {"ace_weight": 0.0, "kl_weight": 0.0, "dice_weight": 0.0}
    logits.requires_grad_()
    optimizer = torch.optim.SGD([logits], 2.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = sk.supervised_evidential_loss(logits, target, image, **options)
        loss.backward()
        optimizer.step()
    u = sk.dirichlet_uncertainty(logits.detach()).vacuity
    found = [sign * float(torch.corrcoef(torch.stack((u[i][on[i]], g[i][on[i]])))[0, 1]) for i in range(2)]
    assert found == pytest.approx([-0.4, -0.4], abs=0.05)
    assert float(loss.detach()) < 0.05


@pytest.mark.parametrize("relation", ["decreasing", "increasing"])
@pytest.mark.parametrize(("cached", "within_class"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_exact_form_is_the_ranking_of_all_pairs(relation, cached, within_class, dtype):
    """Loss, terms and gradient against the parts put together by autograd."""
    logits, target, image = setting()
    target[0, 0, :4] = -100
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) < 0.9
    g, d = sk.gradient_magnitude(image), sk.boundary_distance(target)
    counted = (mask & (target != -100))[:, None]

    def parts(z):
        u = sk.reference.dirichlet_uncertainty(z, prior=0.5).vacuity
        groups = target[:, None] if within_class else None
        ranking = sk.reference.gradient_uncertainty_loss(u, g, d, mask=counted, groups=groups, relation=relation)
        far = u[(d > 2.5) & counted].mean()
        loss = sk.reference.evidential_loss(z, target, prior=0.5, mask=mask)
        return loss + 7 * ranking + 3 * far, ranking, far

    def whole(z):
        options = {"supervision": "exact", "relation": relation, "prior": 0.5, "mask": mask, "near": 2.5, "far": 2.5}
        options["within_class"] = within_class
        source = {"gradient": g.to(dtype)} if cached else {}
        loss, terms = sk.supervised_evidential_loss(
            z, target, image.to(dtype), gradient_weight=7, far_weight=3, return_terms=True, **options, **source
        )
        return loss, terms.gradient, terms.far

    results = []
    for function, precision in ((parts, torch.float64), (whole, dtype)):
        leaf = logits.to(precision, copy=True).requires_grad_()
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values[0], leaf, torch.tensor(1.5, dtype=precision))
        results.append([*(v.detach().double() for v in values), gradient.double()])
    tolerance = FLOAT64_GRADIENT if dtype == torch.float64 else FLOAT32_GRADIENT_LARGE
    for got, expected in zip(results[1], results[0], strict=True):
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert float(results[0][1]) > 0


def test_the_gradient_vanishes_once_the_relation_holds():
    logits, target, image = setting()
    g = sk.gradient_magnitude(image)
    # Evidence that rises with the image gradient: uncertainty falls with it, as supervision wants.
    logits = (g * torch.ones_like(logits)).requires_grad_()
    options = {"ace_weight": 0.0, "kl_weight": 0.0, "dice_weight": 0.0, "far_weight": 0.0}
    loss = sk.supervised_evidential_loss(logits, target, image, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0
    assert bool((gradient == 0).all())
    loss = sk.supervised_evidential_loss(logits, target, image, relation="increasing", **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) > 0
    assert bool((gradient != 0).any())


def test_descent_makes_the_relation_hold():
    logits, target, image = setting()
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.1)
    options = {"ace_weight": 0.0, "kl_weight": 0.0, "dice_weight": 0.0, "far_weight": 0.1}
    near = sk.boundary_distance(target) <= 1

    def correlation():
        u, g = sk.dirichlet_uncertainty(logits.detach()).vacuity, sk.gradient_magnitude(image)
        return float(torch.corrcoef(torch.stack((u[near], g[near])))[0, 1])

    logits.data += 0.5 * (1 - sk.gradient_magnitude(image) * 4)
    before = correlation()
    for _ in range(60):
        optimizer.zero_grad()
        sk.supervised_evidential_loss(logits, target, image, gradient_weight=100.0, **options).backward()
        optimizer.step()
    assert before > 0.3
    assert correlation() < 0.05


@pytest.mark.parametrize("supervision", ["covariance", "correlation", "exact"])
@pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
def test_nothing_to_rank_is_zero(namespace, supervision):
    logits, target, image = setting()
    cases = {
        "no boundary": (logits, torch.zeros_like(target), image),
        "constant image": (logits, target, torch.full_like(image, 3.0)),
        "ramp: constant gradient": (
            logits,
            target,
            1e6 * torch.arange(14.0, dtype=torch.float64).expand_as(image).contiguous(),
        ),
    }
    for name, (z, y, x) in cases.items():
        for dtype in (torch.float64, torch.float32):
            leaf = z.to(dtype, copy=True).requires_grad_()
            loss, terms = namespace.supervised_evidential_loss(
                leaf,
                y,
                x.to(dtype),
                supervision=supervision,
                padding_mode="extrapolate",
                far_weight=0.0,
                return_terms=True,
            )
            (gradient,) = torch.autograd.grad(loss, leaf)
            plain = z.to(dtype, copy=True).requires_grad_()
            (expected,) = torch.autograd.grad(namespace.evidential_loss(plain, y), plain)
            assert float(terms.gradient) == 0, name
            assert torch.allclose(gradient, expected), name


def test_handed_in_maps_give_the_same():
    logits, target, image = setting()
    expected = sk.supervised_evidential_loss(logits, target, image, near=2.0)
    maps = {
        "gradient": sk.gradient_magnitude(image),
        "distance": sk.boundary_distance(target),
        "band": sk.boundary_band(target, near=2.0),
    }
    for names in (("gradient",), ("distance",), ("band",), ("gradient", "band")):
        given = {k: maps[k] for k in names}
        got = sk.supervised_evidential_loss(logits, target, image, near=2.0, **given)
        torch.testing.assert_close(got, expected)
    got = sk.supervised_evidential_loss(logits, target, None, gradient=maps["gradient"], band=maps["band"])
    torch.testing.assert_close(got, expected)


def test_what_cannot_get_a_gradient_refuses_one():
    logits, target, image = setting()
    g = sk.gradient_magnitude(image)
    with pytest.raises(ValueError, match="image: requires a gradient"):
        sk.supervised_evidential_loss(logits, target, image.clone().requires_grad_())
    with pytest.raises(ValueError, match="gradient: requires a gradient"):
        sk.supervised_evidential_loss(logits, target, image, gradient=g.clone().requires_grad_())


def test_sure_loss_follows_its_schedules():
    logits, target, image = setting()
    loss = sk.SURELoss(num_epochs=50, good_model_step=20, annealing_steps=10, gradient_weight=3.0, far_weight=2.0)
    for epoch in (0, 5, 19, 20, 35, 50):
        loss.set_epoch(epoch)
        weight = schedules.supervision_weight(epoch, 20, 50)
        expected = sk.supervised_evidential_loss(
            logits,
            target,
            image,
            ace_weight=10.0,
            dice_weight=10.0,
            kl_weight=min(1.0, epoch / 10),
            gradient_weight=3 * weight,
            far_weight=2 * weight,
        )
        torch.testing.assert_close(loss(logits, target, image=image), expected)
    other = sk.SURELoss(num_epochs=50, good_model_step=20)
    other.load_state_dict(loss.state_dict())
    assert other.epoch == 50
    assert schedules.supervision_weight(20, 20, 50) == pytest.approx(0.01)
    assert schedules.supervision_weight(50, 20, 50) == pytest.approx(1.0)


def noised(logits, seed=1):
    """Two sets of logits for noised images, their levels, and points of which some are none."""
    g = torch.Generator().manual_seed(seed)
    noisy = [logits + torch.randn(logits.shape, generator=g, dtype=logits.dtype) for _ in range(2)]
    points = torch.stack([torch.randint(0, s, (len(logits), 9), generator=g) for s in logits.shape[2:]], -1)
    points[0, 0] = -1
    return noisy, [0.3, 0.8], points


@pytest.mark.parametrize("within_class", [False, True])
@pytest.mark.parametrize("pointwise", [False, True])
def test_sure_loss_of_noised_images_is_its_parts(within_class, pointwise):
    logits, target, image = setting()
    noisy, levels, points = noised(logits)
    points = points if pointwise else None
    target[0, 0] = -100
    mask = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) < 0.9
    options = {"supervision": "exact", "within_class": within_class, "near": 2.5, "far": 2.5}
    loss = sk.SURELoss(
        num_epochs=10, good_model_step=0, annealing_steps=0, gradient_weight=7.0, far_weight=50.0, noise_weight=3.0,
        noise_weights=(1.0, 0.5, 2.0), return_terms=True, **options,
    )  # fmt: skip
    loss.set_epoch(10)
    leaves = [z.clone().requires_grad_() for z in (logits, *noisy)]
    got, terms = loss(leaves[0], target, image=image, mask=mask, noisy=leaves[1:], levels=levels, points=points)
    grads = torch.autograd.grad(got, leaves)

    u = [sk.reference.dirichlet_uncertainty(z).vacuity for z in leaves]
    d = sk.boundary_distance(target, max_distance=2.5)
    counted = (mask & (target != -100))[:, None]
    shared = {"mask": counted, "groups": target[:, None] if within_class else None}
    ranking = sk.reference.gradient_uncertainty_loss(u[0], sk.gradient_magnitude(image), d, **shared)
    noise, parts = sk.reference.noise_uncertainty_loss(
        u[0], u[1:], levels, d, points=points, near=2.5, weights=(1.0, 0.5, 2.0), return_terms=True, **shared
    )
    evidential = sk.reference.evidential_loss(leaves[0], target, mask=mask, ace_weight=10.0, dice_weight=10.0)
    # F is part of L_far here: far_weight does not count.
    expected = evidential + 7 * ranking + 3 * noise
    torch.testing.assert_close(got, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(terms.gradient, ranking.detach())
    torch.testing.assert_close(torch.stack(terms[4:]), torch.stack((parts.far, parts.mu, parts.d)))
    assert all(float(t) > 0 for t in terms)


def test_soft_sure_loss_is_its_parts():
    logits, target, image = setting()
    noisy, levels, _ = noised(logits)
    soft = sk.SoftThresholds(d_g=1.0, d_f=3.0, d_n=2.5, d_eps=1.0)
    loss = sk.SURELoss(
        num_epochs=10, good_model_step=0, annealing_steps=0, far_weight=0.0, soft=soft, spacing=(1.0, 2.0)
    )
    loss.set_epoch(10)
    generator = torch.Generator().manual_seed(0)
    got = loss(logits, target, image=image, noisy=noisy, levels=levels, generator=generator)
    generator = torch.Generator().manual_seed(0)
    u = [sk.dirichlet_uncertainty(z).vacuity for z in (logits, *noisy)]
    d = sk.boundary_distance(target, spacing=(1.0, 2.0))
    shared = {"groups": target, "soft": soft, "generator": generator}
    g = sk.gradient_magnitude(image, spacing=(1.0, 2.0))
    expected = sk.evidential_loss(logits, target, ace_weight=10.0, dice_weight=10.0)
    expected = expected + sk.gradient_uncertainty_loss(u[0], g, d, **shared)
    expected = expected + sk.noise_uncertainty_loss(u[0], u[1:], levels, d, **shared)
    torch.testing.assert_close(got, expected)


def test_noised_logits_wait_for_their_epoch():
    logits, target, image = setting()
    noisy, levels, points = noised(logits)
    loss = sk.SURELoss()
    assert not loss.wants_noise
    torch.testing.assert_close(
        loss(logits, target, image=image, noisy=noisy, levels=levels, points=points),
        loss(logits, target, image=image),
    )
    loss.set_epoch(30)
    assert loss.wants_noise
    assert not sk.SURELoss(noise_weight=0.0, good_model_step=0).wants_noise
    one_hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    options = {"image": image, "noisy": noisy, "levels": levels, "points": points}
    torch.testing.assert_close(loss(logits, one_hot, **options), loss(logits, target, **options))


def test_sure_loss_says_what_is_wrong():
    with pytest.raises(ValueError, match="num_epochs: expected more than good_model_step"):
        sk.SURELoss(num_epochs=30, good_model_step=30)
    with pytest.raises(ValueError, match="noise_weights: expected 3 numbers"):
        sk.SURELoss(noise_weights=(1.0, 1.0))
    logits, target, image = setting()
    late = sk.SURELoss()
    late.set_epoch(40)
    with pytest.raises(TypeError, match="image: expected"):
        late(logits, target)
    with pytest.raises(TypeError, match="levels: expected 2 numbers"):
        late(logits, target, image=image, noisy=[logits, logits])
    with pytest.raises(ValueError, match="levels: expected 2 numbers"):
        late(logits, target, image=image, noisy=[logits, logits], levels=[0.5])
    with pytest.raises(ValueError, match="within_class: expected supervision='exact'"):
        sk.supervised_evidential_loss(logits, target, image, within_class=True)


LATER = {
    "image of another shape": ({"image": lambda x: x[..., 1:]}, ValueError, "image: expected shape"),
    "image of integers": ({"image": lambda x: x.long()}, TypeError, "image: expected float32"),
    "gradient with a gradient": (
        {"gradient": lambda x: x.clone().requires_grad_()},
        ValueError,
        "gradient: requires a",
    ),
    "distance of integers": ({"image": lambda x: x, "distance": lambda x: x.long()}, TypeError, "distance: expected a"),
    "band of floats": ({"image": lambda x: x, "band": lambda x: x}, TypeError, "band: expected uint8"),
}


@pytest.mark.parametrize("options", [{}, {"supervision": "exact"}, {"gradient_weight": 0.0, "noise_weight": 0.0}])
@pytest.mark.parametrize(("maps", "error", "message"), LATER.values(), ids=LATER)
def test_sure_loss_checks_maps_before_it_reads_them(maps, error, message, options):
    logits, target, image = setting()
    loss = sk.SURELoss(**options)
    with pytest.raises(error, match=message):
        loss(logits, target, **{name: made(image) for name, made in maps.items()})


@pytest.mark.parametrize(
    ("options", "later"),
    [
        ({}, True),
        ({"soft": sk.SoftThresholds()}, True),
        ({"gradient_weight": 0.0, "noise_weight": 0.0}, True),
        ({"gradient_weight": 0.0}, False),  # noised logits may take the far term's place in every step
        ({"gradient_weight": 0.0, "far_weight": 0.0}, False),
    ],
    ids=str,
)
def test_sure_loss_says_once_that_an_image_will_be_needed(options, later):
    logits, target, image = setting()
    loss = sk.SURELoss(**options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, second = loss(logits, target), loss(logits, target)
        torch.testing.assert_close(sk.SURELoss(**options)(logits, target, image=image), first)
    assert torch.equal(first, second)
    assert [str(w.message).split(";")[0] for w in said] == ["image: got None and no `gradient`"] * later
    assert all("from epoch 30 (good_model_step) on" in str(w.message) for w in said)
    assert all(w.filename == __file__ for w in said)


def test_a_loss_that_would_train_nothing_is_refused():
    logits, target, image = setting()
    u = sk.dirichlet_uncertainty(logits.clone().requires_grad_()).vacuity
    g, d = sk.gradient_magnitude(image), sk.boundary_distance(target)
    with pytest.raises(ValueError, match=r"gradient: requires a gradient.*\(uncertainty, gradient\) in this order"):
        sk.gradient_uncertainty_loss(g, u, d)
    with pytest.raises(ValueError, match=r"scores: requires a gradient.*\(values, scores\) in this order"):
        sk.pairwise_ranking_loss(g, u)
    assert sk.gradient_uncertainty_loss(u, u, d).requires_grad  # detached, as documented
    with torch.no_grad():
        sk.gradient_uncertainty_loss(g, u, d)


def test_modules_are_the_functions():
    logits, target, image = setting()
    assert torch.equal(sk.GradientMagnitude(operator="scharr")(image), sk.gradient_magnitude(image, operator="scharr"))
    got = sk.DirichletUncertainty(measures=("entropy",))(logits)
    assert torch.equal(got.entropy, sk.dirichlet_uncertainty(logits, measures=("entropy",)).entropy)
    loss = sk.EvidentialLoss(kind="log", dice_weight=2.0)
    assert torch.equal(loss(logits, target), sk.evidential_loss(logits, target, kind="log", dice_weight=2.0))
    assert "kind='log'" in repr(loss)
    u, d = sk.dirichlet_uncertainty(logits).vacuity, sk.boundary_distance(target)
    g = sk.gradient_magnitude(image)
    ranking = sk.GradientUncertaintyLoss(max_distance=2.0, relation="increasing")
    expected = sk.gradient_uncertainty_loss(u, g, d, max_distance=2.0, relation="increasing", groups=target)
    assert torch.equal(ranking(u, g, d, groups=target), expected)
    assert "good_model_step=30" in repr(sk.SURELoss())


@pytest.mark.parametrize("backend", ["reference", "eager", "compiled"])
@pytest.mark.parametrize("source", ["image", "gradient"])
@pytest.mark.parametrize("supervision", ["covariance", "correlation", "exact"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_magnitudes_on_the_boundary_are_named(backend, source, supervision, bad):
    logits, given = torch.randn((1, 3, 4, 5, 6)), torch.rand((1, 1, 4, 5, 6))
    target = (torch.arange(4) > 1).long().view(1, 4, 1, 1).expand(1, 4, 5, 6)
    given[0, 0, 1, 2, 3] = bad
    kwargs = {"image": None, source: given, "supervision": supervision}
    with sk.backend(backend), pytest.raises(ValueError, match=f"{source}: expected finite values"):
        sk.supervised_evidential_loss(logits, target, **kwargs)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("source", ["image", "gradient"])
@pytest.mark.parametrize("supervision", ["covariance", "correlation"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_magnitudes_off_the_boundary_are_not_read(backend, source, supervision, bad):
    """Where a voxel does not count, and where one that does is not on the boundary."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((2, 3, 6, 5, 8), generator=generator)
    target = torch.randint(0, 3, (2, 6, 5, 8), generator=generator)
    band = torch.zeros((2, 1, 6, 5, 8), dtype=torch.uint8)
    band[..., :2], band[..., 2:4] = BOUNDARY, FAR
    target[..., 6:] = -100
    given = torch.rand((2, 1, 6, 5, 8), generator=generator)
    spoilt = given.clone()
    # The filter reaches one voxel further.
    spoilt[..., 3:] = bad
    results = []
    for x in (given, spoilt):
        z = logits.clone().requires_grad_()
        kwargs = {source: x, "band": band, "supervision": supervision, "relation": "increasing"}
        with sk.backend(backend):
            loss = sk.supervised_evidential_loss(z, target, kwargs.pop("image", None), **kwargs, gradient_weight=9.0)
        loss.backward()
        results.append((loss.detach(), z.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
