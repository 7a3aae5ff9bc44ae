"""Values and gradients against figures that the published programs returned (see each file's origin in its name)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import GOLDEN_FLOAT32, GOLDEN_FLOAT64, GOLDEN_GRADIENT, GOLDEN_OFFICIAL

import sure_kernels as sk
from sure_kernels import schedules
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
    data = golden("08_image_gradient")

    def check(image, expected, factor=1.0, **options):
        got = factor * namespace.gradient_magnitude(image.to(dtype), **options)
        # The published maps are float32 image filters.
        assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())

    central = {"operator": "central", "padding_mode": "extrapolate"}
    check(data["img2d"], data["sure_2d"][:, None], **central)
    check(data["img2d"], data["prius_sobel_2d"][:, None], 8.0)
    check(data["img2d"], data["prius_2d"][:, None], 32.0)
    check(data["rgb"].mean(1, keepdim=True), data["prius_rgb"][:, None], 32.0)
    grey = (data["rgb"] * torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    check(grey, data["sure_rgb"][:, None], **central)
    check(data["img3d"], data["sure_3d"][:, None], **central)
    check(data["img3d"], data["prius_3d"][:, None], **central)
    two = torch.cat((data["img3d"], data["img3d_2ch"][:, None]), 1)
    check(two, data["prius_3d_2ch"][:, None], channel_reduction="max", **central)
    per_channel = data["sure_3d_2ch"].view(1, 10, 12, 14, 2).movedim(-1, 1)
    for channel in range(2):
        check(two[:, channel : channel + 1], per_channel[:, channel : channel + 1], **central)


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
