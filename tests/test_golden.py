"""Values and gradients against figures that the published programs returned (see each file's origin in its name)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden_cases import image_gradients
from monai.transforms import ClipIntensityPercentiles, Compose, NormalizeIntensity, ScaleIntensity
from tolerances import GOLDEN_FILTERED, GOLDEN_FLOAT32, GOLDEN_FLOAT64, GOLDEN_GRADIENT, GOLDEN_OFFICIAL

import sure_kernels as sk
from sure_kernels import schedules
from sure_kernels.ops.noise_patches import closed_form as patches_closed_form
from sure_kernels.ops.noise_patches import reference as patches_reference
from sure_kernels.ops.ranking import closed_form

WAYS = {"reference in float64": (sk.reference, torch.float64), "eager in float32": (sk, torch.float32)}


def relative(got, expected) -> float:
    return abs(float(got.detach()) - float(expected)) / abs(float(expected))


def gradient_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["01_edl_sure_0", "01_edl_sure_1"])
@pytest.mark.parametrize("kind", ["log", "digamma", "mse"])
@pytest.mark.parametrize("form", ["edl_loss", "edl_loss_a"])
def test_sure_evidential_loss(golden, file, kind, form, way):
    namespace, dtype = WAYS[way]
    data = golden(file)
    prefix = f"{form}_{kind}"
    for row, epoch in enumerate(data["epochs"].tolist()):
        logits = data["logits"].to(dtype, copy=True).requires_grad_()
        annealed = 0.01 ** (1 - epoch / data["total_epoch"])
        weights = (1.0, 1 - annealed) if form == "edl_loss" else (10.0, 10.0)
        loss, terms = namespace.evidential_loss(
            logits,
            data["labels"],
            kind=kind,
            ace_weight=weights[0],
            kl_weight=schedules.kl_weight(epoch, data["annealing_steps"]),
            dice_weight=weights[1],
            compat="official" if kind == "mse" else None,
            return_terms=True,
        )
        loss.backward()
        ours = GOLDEN_FLOAT32 if dtype == torch.float32 else GOLDEN_FLOAT64
        official = GOLDEN_FLOAT32 if dtype == torch.float32 else GOLDEN_OFFICIAL
        for got, ref, out in zip(
            (loss, *terms), data[f"{prefix}_ref64"][row], data[f"{prefix}_out64"][row], strict=True
        ):
            assert relative(got, ref) < ours
            assert relative(got, out) < official
        assert gradient_error(logits.grad, data[f"{prefix}_grad"][row]) < GOLDEN_GRADIENT


def test_concentration_helpers(golden):
    data = golden("02_dice_kl")
    alpha, labels = data["alpha"].double(), data["labels"].long()
    y = F.one_hot(labels, 4).double()
    for concentration, prior, values, gradients in (
        (alpha, torch.ones(4).double(), "kl64", "kl_grad"),
        (data["prius_alpha"].double(), data["prior"].double(), "prius_kl64", "prius_kl_grad"),
    ):
        wrong = ((concentration - 1) * (1 - y) + 1).requires_grad_()
        kl = sk.reference.dirichlet_kl(wrong, prior)
        kl.sum().backward()
        # ln G(C) of the published program is a float32 constant.
        assert float((kl.detach() - data[values][:, 0]).abs().max()) < 1e-7
        assert gradient_error(wrong.grad, data[gradients]) < GOLDEN_GRADIENT

    p = data["prob"].double().requires_grad_()
    m = y + 1e-3
    dice = sk.reference.adaptive_tversky((p * m).sum(0), p.sum(0), m.sum(0))
    dice.sum().backward()
    assert float((dice.detach() - data["dice64"]).abs().max()) < GOLDEN_OFFICIAL
    assert gradient_error(p.grad, data["dice_grad"]) < GOLDEN_GRADIENT


@pytest.mark.parametrize("way", WAYS)
def test_prius_evidential_loss(golden, way):
    namespace, dtype = WAYS[way]
    data = golden("03_edl_prius")
    rows = [i for i in range(24) if data["combo_coef_cu"][i] == 0]
    assert rows
    for row in rows:
        epoch = int(data["combo_epoch"][row])
        has_prior = bool(data["combo_has_prior"][row])
        kind = "mse" if data["combo_mse"][row] else "digamma"
        logits = data["logits"].to(dtype, copy=True).requires_grad_()
        loss, terms = namespace.evidential_loss(
            logits,
            data["labels"],
            kind=kind,
            prior=data["prior"] if has_prior else 1.0,
            kl_weight=schedules.kl_weight(epoch, 20),
            dice_weight=1 - 0.01 ** (1 - epoch / 100),
            compat="official" if has_prior or kind == "mse" else None,
            return_terms=True,
        )
        loss.backward()
        tolerance = GOLDEN_FLOAT32 if dtype == torch.float32 else GOLDEN_OFFICIAL
        for got, out in zip((loss, *terms), data["out64"][row], strict=False):
            assert relative(got, out) < tolerance
        assert gradient_error(logits.grad, data["grad"][row]) < GOLDEN_GRADIENT


@pytest.mark.parametrize("way", WAYS)
def test_image_gradients(golden, way):
    namespace, dtype = WAYS[way]
    for image, expected, factor, options in image_gradients(golden("08_image_gradient")):
        got = factor * namespace.gradient_magnitude(image.to(dtype), **options)
        # The published maps are float32 image filters.
        assert float((got - expected).abs().max()) < GOLDEN_FILTERED * float(expected.abs().max())


def boundary_maps(golden, file, dtype):
    """(data, (u, g, d)) of one of the files 04, maps (N, 1, *spatial)."""
    data = golden(file)
    u, g, d = (data[name].to(dtype if name == "u" else torch.float64, copy=True)[:, None] for name in "ugd")
    return data, (u.requires_grad_(), g, d)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["04_gradient_loss_0", "04_gradient_loss_1"])
def test_gradient_loss_over_all_pairs(golden, file, way):
    namespace, dtype = WAYS[way]
    data, (u, g, d) = boundary_maps(golden, file, dtype)
    tolerance = GOLDEN_FLOAT32 if dtype == torch.float32 else GOLDEN_FLOAT64
    loss = namespace.gradient_uncertainty_loss(u, g, d, max_distance=data["delta"])
    loss.backward()
    assert relative(loss, data["ref_loss"]) < tolerance
    assert gradient_error(u.grad[:, 0], data["ref_grad_u"]) < GOLDEN_GRADIENT
    for i, expected in enumerate(data["ref_per_image"]):
        one = namespace.gradient_uncertainty_loss(u[i : i + 1].detach(), g[i : i + 1], d[i : i + 1])
        assert float(one) == pytest.approx(float(expected), rel=tolerance, abs=0)
    points = closed_form.sets_of(u.detach().flatten(1), g.flatten(1), d.flatten(1) <= 1, None, "decreasing")
    assert torch.equal(points.sizes, data["n_boundary"])
    assert torch.equal(closed_form.violating_pairs(points).number, data["ref_pos_pairs"])


@pytest.mark.parametrize("file", ["04_gradient_loss_0", "04_gradient_loss_1"])
def test_published_gradient_loss(golden, file):
    """The program's own pairs, drawn from the same seed: chunk-summed, and fewer for every image."""
    data, (u, g, d) = boundary_maps(golden, file, torch.float32)

    def loss(seed, num_pairs):
        generator = torch.Generator().manual_seed(seed)
        options = {"method": "sampled", "num_pairs": num_pairs, "generator": generator, "compat": "official"}
        return sk.gradient_uncertainty_loss(u, g, d, **options)

    for i, expected in enumerate(data["full_losses"]):
        assert relative(loss(1000 + i, 10**7), expected) < GOLDEN_FLOAT32
    assert relative(loss(5, None), data["none_loss"]) < GOLDEN_FLOAT32
    # What the drawn pairs tend to.
    exact = sk.gradient_uncertainty_loss(u, g, d, compat="official")
    assert relative(exact, data["full_losses"].mean()) < 2e-3
    sizes = data["n_boundary"].tolist()
    samples = [n for n in closed_form.published_samples(sizes, 10**7) if n]
    assert samples == data["full_samples"].tolist()


@pytest.mark.parametrize("file", ["04_gradient_loss_0", "04_gradient_loss_1"])
@pytest.mark.parametrize("size", [4000, 45000])
def test_published_gradient_loss_of_given_pairs(golden, file, size, monkeypatch):
    data, (u, g, d) = boundary_maps(golden, file, torch.float32)
    drawn = [data[f"s{size}_{c}"].long().split(data[f"s{size}_len"].tolist()) for c in "ij"]
    given = iter([part for pair in zip(*drawn, strict=True) for part in pair])
    monkeypatch.setattr(
        torch, "randint", lambda low, high, shape, **_: next(given) if shape[0] else torch.zeros(0, dtype=torch.int64)
    )
    loss = sk.gradient_uncertainty_loss(u, g, d, method="sampled", num_pairs=size, compat="official")
    loss.backward()
    assert relative(loss, data[f"s{size}_loss"]) < GOLDEN_FLOAT32
    assert gradient_error(u.grad[:, 0], data[f"s{size}_grad_u"]) < GOLDEN_GRADIENT


@pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
def test_boundary_distances(golden, namespace):
    data = golden("09_distance_map")
    for name in ("rand0", "rand1", "noise0", "noise1", "edge3d"):
        labels, squared = data[f"{name}_labels"], data[f"{name}_d2"]
        got = namespace.boundary_distance(labels, spatial_dims=labels.ndim - 1)
        present = (labels.flatten(1).amax(1) != labels.flatten(1).amin(1)).view(-1, *(1,) * labels.ndim)
        expected = torch.where(present, squared.double().sqrt()[:, None], math.inf)
        torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=0)


def test_images_without_boundary_are_infinitely_far(golden):
    data = golden("09_distance_map")
    got = sk.boundary_distance(data["edge_labels"])
    assert bool(torch.isinf(got[:2]).all())
    rest = data["edge_d2"][2:].double().sqrt()[:, None].float()
    present = torch.isfinite(got[2:].flatten(1)).all(1)
    assert int(present.sum()) >= 3
    torch.testing.assert_close(got[2:][present], rest[present], rtol=1e-6, atol=0)


def test_schedules(golden):
    data = golden("14_schedules")
    for epoch in range(data["T"]):
        assert math.isclose(schedules.kl_weight(epoch, data["annealing_steps"]), float(data["kl_coef"][epoch]))
        got = schedules.supervision_weight(epoch, data["good_model_step"], data["T"])
        if epoch < data["good_model_step"]:
            assert got == 0
        else:
            assert math.isclose(got, float(data["au_unc"][epoch]), rel_tol=1e-6)
            start, end = data["good_model_step"], data["T"]
            assert min(int(40 * schedules.ramp(epoch, start, end) + 2), 40) == data["upper2d"][epoch]
            assert int(50 * schedules.ramp(epoch, start, 0.9 * end)) == data["upper3d"][epoch]
        # The Dice weight of the published programs fades by this with t0 = 0; PriUS's bounds on the noise are ramps.
        fading = schedules.supervision_weight(epoch, 0, data["T"])
        assert math.isclose(fading, float(data["au_edl"][epoch]), rel_tol=1e-6)


def noise_maps(data, names, dtype):
    """Maps (N, 1, *spatial), each a leaf."""
    maps = [data[name].to(dtype, copy=True) for name in names]
    return [(u if u.ndim == data["d"].ndim + 1 else u.unsqueeze(1)).requires_grad_() for u in maps]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["05_nu_losses_0", "05_nu_losses_1"])
@pytest.mark.parametrize("masked", ["", "_masked"])
def test_published_noise_losses(golden, file, masked, way):
    namespace, dtype = WAYS[way]
    data = golden(file)
    names = ("u", "u1", "u2")
    n, p, _ = data["indexes"].shape
    at = (torch.arange(n)[:, None].expand(n, p), 0, *data["indexes"].unbind(-1))
    distance = data["d"].unsqueeze(1)
    torch.testing.assert_close(distance[at].float(), data["d_patch"], rtol=0, atol=0)
    for i, term in enumerate(("mu", "d", "far")):
        maps = noise_maps(data, names, dtype)
        loss, terms = namespace.noise_uncertainty_loss(
            maps[0],
            maps[1:],
            (data["mu1"], data["mu2"]),
            distance,
            points=data["indexes"],
            near=data["threshold"],
            weights=[float(i == k) for k in range(3)],
            mask=data["mask"] if masked else None,
            compat="official",
            return_terms=True,
        )
        loss.backward()
        assert float(loss.detach()) == float(terms[i])
        # The published buffers are float32 in both runs.
        for width in (32, 64):
            assert relative(loss, data[f"loss_{term}{masked}{width}"]) < GOLDEN_FLOAT32
        for u, name in zip(maps, names, strict=True):
            if term == "far":
                assert relative(u.grad.sum(), data[f"grad_far{masked}_{name}_sum"]) < GOLDEN_FLOAT32
                far = distance > data["threshold"]
                far = far & (data["mask"] > 0) if masked else far
                torch.testing.assert_close(u.grad, far / far.sum().to(dtype), rtol=1e-6, atol=0)
            else:
                stored = data[f"grad_{term}{masked}_{name}"]
                assert gradient_error(u.grad[at], stored) < GOLDEN_GRADIENT
                u.grad[at] = 0
                assert bool((u.grad == 0).all())


def test_published_noise_losses_without_anything_to_say(golden):
    for file in ("05_nu_losses_0", "05_nu_losses_1"):
        data = golden(file)
        u, distance = data["u"].unsqueeze(1), data["d"].unsqueeze(1)
        sign = math.copysign(1.0, data["mu2"] - data["mu1"])
        options = {"points": data["indexes"], "near": data["threshold"], "compat": "official"}
        # In the published order of additions: what is left is the rounding of u + 0.2 - 0.2.
        loss = sk.noise_uncertainty_loss(
            u, (u + 0.1, u + 0.2 * sign + 0.2), (data["mu1"], data["mu2"]), distance, weights=(1, 0, 0), **options
        )
        assert float(loss) == pytest.approx(data["mu_noviolation"], rel=GOLDEN_FLOAT32)
        # Published: 0 / 0.
        assert math.isnan(data["far_empty"])
        nowhere = torch.zeros_like(distance)
        assert float(sk.noise_uncertainty_loss(u, (u, u), (0.1, 0.2), nowhere, weights=(0, 0, 1), **options)) == 0


def prius_2d(golden, file, dtype):
    data = golden(file)
    soft = sk.SoftThresholds(**{name[4:]: value for name, value in data.items() if name.startswith("cfg_")})
    maps = noise_maps(data, ("u0", "u1", "u2"), dtype)
    return data, soft, maps, data["d"].unsqueeze(1), data["labels"].unsqueeze(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["11_prius2d_soft_0", "11_prius2d_soft_1"])
def test_prius_soft_losses(golden, file, way):
    namespace, dtype = WAYS[way]
    data, soft, maps, distance, labels = prius_2d(golden, file, dtype)
    tolerance = GOLDEN_FLOAT32 if dtype == torch.float32 else GOLDEN_FLOAT64
    # float32 gradients of a sum of 1000 terms and more.
    gradient_tolerance = GOLDEN_FLOAT32 if dtype == torch.float32 else GOLDEN_GRADIENT
    options = {"soft": soft, "groups": labels, "compat": "official"}

    loss = namespace.gradient_uncertainty_loss(
        maps[0], data["g"], distance, pairs=data["gu_u0_idx"].view(-1, 2), **options
    )
    (gradient,) = torch.autograd.grad(loss, maps[0])
    assert relative(loss, data["gu_u0_loss64"]) < tolerance
    assert relative(loss, data["gu_u0_loss32"]) < GOLDEN_FLOAT32
    assert gradient_error(gradient, data["gu_u0_grad"]) < gradient_tolerance

    for i, u in enumerate(maps):
        # Of one map: the mean over a map and itself.
        pairs = data[f"du_u{i}_idx"].view(-1, 2)
        loss = namespace.noise_uncertainty_loss(u, [u], [1.0], distance, weights=(0, 1, 1), pairs=pairs, **options)
        (gradient,) = torch.autograd.grad(loss, u)
        assert relative(loss, data[f"du_u{i}_loss64"]) < tolerance
        assert relative(loss, data[f"du_u{i}_loss32"]) < GOLDEN_FLOAT32
        assert gradient_error(gradient, data[f"du_u{i}_grad"]) < gradient_tolerance

    for name in ("up", "down", "equal"):
        start, *levels = data[f"nu_{name}_sigmas"].tolist()
        assert start == 0
        loss = namespace.noise_uncertainty_loss(maps[0], maps[1:], levels, distance, weights=(1, 0, 0), **options)
        gradients = torch.autograd.grad(loss, maps, allow_unused=True)
        assert relative(loss, data[f"nu_{name}_loss64"]) < tolerance
        assert relative(loss, data[f"nu_{name}_loss32"]) < GOLDEN_FLOAT32
        assert gradients[0] is None
        for i in (1, 2):
            stored = data[f"nu_{name}_grad_u{i}"]
            assert float((gradients[i] - stored).abs().max()) <= gradient_tolerance * float(stored.abs().max())


def test_prius_windows_and_indicators(golden):
    for file in ("11_prius2d_soft_0", "11_prius2d_soft_1"):
        data, soft, maps, _, _ = prius_2d(golden, file, torch.float64)
        mean = sk.reference.window_mean(maps[0].detach(), soft.normal_kernel, official=True)
        torch.testing.assert_close(mean, data["u_agg"].double(), rtol=0, atol=2**-23)
        torch.testing.assert_close(
            sk.reference.window_max(data["g"], soft.normal_kernel), data["g_agg"], rtol=0, atol=0
        )
        for name, alpha in (("sig_a10", 10.0), ("sig_a100", 100.0)):
            got = sk.reference.soft_indicator(data["sig_x"], alpha)
            torch.testing.assert_close(got, data[name], rtol=GOLDEN_FLOAT32, atol=0)
        # The penalty of the published losses is the identity; they never use the other one.
        assert torch.equal(data["pen_id"], data["sig_x"])
        torch.testing.assert_close(data["pen_exp"], data["sig_x"].exp())


@pytest.mark.parametrize("way", WAYS)
def test_prius_3d_noise_losses(golden, way):
    namespace, dtype = WAYS[way]
    data = golden("12_prius3d_losses_0")
    distance = data["d"].unsqueeze(1)
    torch.testing.assert_close(data["d"].double().square(), data["d2"].double(), rtol=1e-6, atol=0)
    options = {"near": data["threshold"], "compat": "official"}
    maps = noise_maps(data, ("u0", "u1", "u2"), dtype)
    # A pair of maps at levels a and b is a clean map and one at level b - a.
    for name, first in (("s01", 0), ("s12", 1), ("s12rev", 1)):
        a, b = data[f"sigma_{name}"].tolist()
        before, after = maps[first : first + 2]
        loss = namespace.noise_uncertainty_loss(before, [after], [b - a], distance, weights=(1, 0, 0), **options)
        gradients = torch.autograd.grad(loss, (before, after))
        for width in (32, 64):
            assert relative(loss, data[f"nusigma_{name}_{width}"]) < GOLDEN_FLOAT32
        stored = data[f"nusigma_{name}_grad_ub"]
        assert gradient_error(gradients[1], stored) < GOLDEN_GRADIENT
        assert gradient_error(gradients[0], -stored) < GOLDEN_GRADIENT

    loss = namespace.noise_uncertainty_loss(
        maps[0], maps[1:], (1.0, 2.0), distance, weights=(0, 0, 1), near=data["threshold"]
    )
    assert relative(loss, data["far_loss64"]) < GOLDEN_FLOAT32
    far = distance > data["threshold"]
    assert int(far.sum()) == data["far_count"]
    for gradient in torch.autograd.grad(loss, maps):
        torch.testing.assert_close(gradient, far / far.sum().to(dtype), rtol=1e-6, atol=0)

    loss = sk.reference.prius_distance_loss(maps[0], data["d"], data["nud_idx"])
    (gradient,) = torch.autograd.grad(loss, maps[0])
    for width in (32, 64):
        assert relative(loss, data[f"nud_loss{width}"]) < GOLDEN_FLOAT32
    assert gradient_error(gradient, data["nud_grad"]) < GOLDEN_FLOAT32


@pytest.mark.parametrize("threshold", [0, 1])
def test_prius_3d_gradient_loss(golden, threshold, monkeypatch):
    """Classes apart and their means added up: over all pairs, and over the pairs that the program drew."""
    data = golden("12_prius3d_losses_0")
    g, d, labels = (data[name].unsqueeze(1) for name in ("g", "d", "labels"))
    u = data["u0"].double().requires_grad_()
    options = {"max_distance": threshold, "groups": labels, "compat": "official"}
    loss = sk.gradient_uncertainty_loss(u, g.double(), d, **options)
    (gradient,) = torch.autograd.grad(loss, u)
    assert relative(loss, data[f"grad_t{threshold}_ref"]) < GOLDEN_FLOAT64
    assert gradient_error(gradient[:, 0], data[f"grad_t{threshold}_ref_grad"]) < GOLDEN_GRADIENT
    for k, expected in enumerate(data[f"grad_t{threshold}_ref_nc"][0]):
        of_class = sk.gradient_uncertainty_loss(u, g.double(), d, max_distance=threshold, mask=labels == k)
        assert relative(of_class, expected) < GOLDEN_FLOAT64

    lengths = data[f"grad_t{threshold}_len"].tolist()
    drawn = [data[f"grad_t{threshold}_{c}"].long().split(lengths) for c in "ij"]
    given = iter([part for pair in zip(*drawn, strict=True) for part in pair])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(given))
    total = 0.0
    for k, pairs in enumerate(lengths):
        on = (labels == k) & (d <= threshold)
        sets = u[on][None], g.double()[on][None]
        total = total + sk.pairwise_ranking_loss(*sets, method="sampled", num_pairs=pairs, compat="official")
    (gradient,) = torch.autograd.grad(total, u)
    assert relative(total, data[f"grad_t{threshold}_loss"]) < GOLDEN_FLOAT32
    assert gradient_error(gradient, data[f"grad_t{threshold}_grad"]) < GOLDEN_GRADIENT


def test_published_noise_fields(golden):
    """The same seed gives the published fields, which the programs share between images."""
    data = golden("13_noise")

    def field(mean, std, seed, shape=(1, 1, 40, 36)):
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        return sk.add_gaussian_noise(torch.zeros(shape), mean=mean, std=std, generator=generator)[0, 0]

    for mean in (0.1, 0.9):
        torch.testing.assert_close(field(mean, 0.3, 1), data[f"sure_field_mu{mean}"], rtol=0, atol=2**-22)
    for std in (10, 40):
        assert torch.equal(field(0.0, std, 1), data[f"prius2d_field_s{std}"])
    assert torch.equal(field(0.0, 1.0, 9), data["prius3d_unit_field"])

    # Patches: one field of a patch's size for each of the two levels, drawn one after the other.
    n, p, _ = data["patch_index"].shape
    generator = torch.Generator().manual_seed(data["patch_seed"])
    for level in (1, 2):
        noise = field(float(data["patch_mu"][level - 1]), 0.3, generator, (1, 1, 3, 3)).reshape(9)
        for ops in (patches_reference, patches_closed_form):
            got = ops.add_patches(data["img"], data["patch_index"], noise.expand(n, 1, p, 9), 3)
            # The stored noise is the difference of two float32 images.
            torch.testing.assert_close(got - data["img"], data[f"patch_delta{level}"], rtol=0, atol=1e-6)


def test_published_patches_are_where_ours_may_be(golden):
    """Centres that the published sampler chose: hard, of their class, near if background, apart, inside."""
    data = golden("13_noise")
    centres, (n, h, w) = data["patch_index"], data["labels"].shape
    at = (torch.arange(n)[:, None], *centres.unbind(-1))
    torch.testing.assert_close(data["d"][at].float(), data["patch_d"], rtol=0, atol=0)
    assert torch.equal(data["labels"][at], torch.arange(4).repeat_interleave(3).expand(n, 12))
    hard, distance = data["umask"], data["d"]
    assert bool(hard[at].all())
    # With priorities that prefer the published centres, ours are the same.
    priority = torch.full((n, h, w), 0.5)
    priority[at] = torch.linspace(1.0, 0.9, 12)
    candidates = hard & ((data["labels"] != 0) | (distance <= 4))
    assert torch.equal(patches_closed_form.patch_centres(priority, data["labels"], candidates, 4, 3, 3), centres)


def test_published_normalisation_around_the_noise(golden):
    """PriUS normalises after adding noise. That is data preparation, here MONAI's; the noise is ours."""
    data = golden("13_noise")
    raw = data["raw"]

    def noisy(std, seed):
        field = torch.zeros(1, *raw.shape[1:])
        generator = torch.Generator().manual_seed(seed)
        return raw + sk.add_gaussian_noise(field, mean=0.0, std=std, generator=generator)

    def check(images, expected, *transforms):
        transform = Compose(transforms)
        got = torch.stack([torch.as_tensor(transform(image)) for image in images])
        torch.testing.assert_close(got, expected, rtol=0, atol=GOLDEN_FLOAT32)

    for name, std in (("maxmin", 0), ("noisy_s10", 10), ("noisy_s40", 40)):
        check(noisy(std, 1), data[f"prius2d_{name}"], ScaleIntensity(0.0, 1.0))
    check(raw, data["prius_zscore"], ClipIntensityPercentiles(0.5, 99.5), NormalizeIntensity())
    low, high, mean, std = data["data_stats"].tolist()
    normalise = NormalizeIntensity(mean, std)
    check(raw.clamp(low, high), data["prius_zscore_stats"], normalise)
    for level in (1, 2):
        noise_std = 5 * float(data["prius3d_sigma"][level - 1])
        check(noisy(noise_std, 9).clamp(low, high), data[f"prius3d_noisy{level}"], normalise)
