"""Every wrong argument is named, with what came and what was expected, before any work starts."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import sure_kernels as sk
from sure_kernels.validation import unless_alike

Z = torch.zeros((2, 3, 4, 5))
Y = torch.zeros((2, 4, 5), dtype=torch.long)
X = torch.zeros((2, 1, 4, 5))


def loss(logits=Z, target=Y, **options):
    return sk.evidential_loss(logits, target, **options)


def supervised(image=X, **options):
    return sk.supervised_evidential_loss(Z, Y, image, **options)


def noise(clean=X, noisy=(X, X), levels=(0.3, 0.7), distance=X, **options):
    return sk.noise_uncertainty_loss(clean, noisy, levels, distance, **options)


def patches(image=X, target=Y, distance=X, hard=X, **options):
    return sk.sample_noise_patches(image, target, distance, hard, **options)


def uncertainty(logits=Z, **options):
    return sk.dirichlet_uncertainty(logits, **options)


def ranking(values=X, scores=X, **options):
    return sk.pairwise_ranking_loss(values, scores, **options)


BAD = {
    "logits no tensor": (lambda: loss([1.0]), TypeError, r"logits: expected a torch.Tensor, got list"),
    "logits integer": (lambda: loss(Z.long()), TypeError, r"logits: expected float32.*got torch.int64"),
    "logits 1D": (lambda: loss(Z[0, 0]), ValueError, r"logits: expected shape \(N, C, \*spatial\)"),
    "logits 4 spatial axes": (lambda: loss(torch.zeros((1, 2, 3, 3, 3, 3))), ValueError, r"logits: .*2 or 3 spatial"),
    "one class": (lambda: loss(Z[:, :1]), ValueError, r"logits: expected at least 2 entries along axis 1"),
    "empty batch": (lambda: loss(Z[:0], Y[:0]), ValueError, r"logits: expected no axis of length 0"),
    "empty axis": (lambda: loss(Z[..., :0], Y[..., :0]), ValueError, r"logits: expected no axis of length 0"),
    "target float": (
        lambda: loss(target=Y.float()),
        TypeError,
        r"target: expected integer labels, got torch.float32; target.long\(\) has them",
    ),
    "target float of another shape": (
        lambda: loss(target=Y[:, :3].float()),
        TypeError,
        r"target: expected integer labels of shape \(2, 4, 5\), got torch.float32 of \(2, 3, 5\)",
    ),
    "target shape": (
        lambda: loss(target=Y[:, :3]),
        ValueError,
        r"target: expected integer labels of shape \(2, 4, 5\) to match logits \(2, 3, 4, 5\), got \(2, 3, 5\)",
    ),
    "label too large": (
        lambda: loss(target=Y + 3),
        ValueError,
        r"target: expected labels in \[0, 2\].*got \[3\] in 40",
    ),
    "label negative": (lambda: loss(target=Y - 1), ValueError, r"target: expected labels in \[0, 2\].*got \[-1\]"),
    "ignore_index float": (lambda: loss(ignore_index=1.5), TypeError, r"ignore_index: expected an int, got float"),
    "mask shape": (lambda: loss(mask=Y[:, :2].bool()), ValueError, r"mask: expected shape \(2, 4, 5\)"),
    "mask values": (lambda: loss(mask=Y + 2), ValueError, r"mask: expected only 0 and 1"),
    "kind": (lambda: loss(kind="ce"), ValueError, r"kind: expected one of digamma, log, mse, got 'ce'"),
    "kind no string": (lambda: loss(kind=1), TypeError, r"kind: expected one of"),
    "evidence": (lambda: loss(evidence="elu"), ValueError, r"evidence: expected one of softplus, relu, exp"),
    "prior small": (lambda: loss(prior=1e-4), ValueError, r"prior: expected finite entries of at least 0.001"),
    "prior NaN": (lambda: loss(prior=math.nan), ValueError, r"prior: expected finite entries"),
    "prior length": (lambda: loss(prior=[1.0, 1.0]), ValueError, r"prior: expected 3 numbers, one per class, got 2"),
    "prior words": (lambda: loss(prior="uniform"), TypeError, r"prior: expected"),
    "class_weight scalar": (lambda: loss(class_weight=1.0), TypeError, r"class_weight: expected 3 numbers"),
    "class_weight length": (
        lambda: loss(class_weight=[1, 2], include_background=False),
        ValueError,
        r"class_weight: expected 3 numbers, one per class, got 2",
    ),
    "class_weight negative": (lambda: loss(class_weight=[1, -1, 1]), ValueError, r"class_weight: expected finite"),
    "class_weight zero": (lambda: loss(class_weight=[0, 0, 0]), ValueError, r"class_weight: .*not all 0"),
    "weight negative": (lambda: loss(ace_weight=-1.0), ValueError, r"ace_weight: expected a finite number"),
    "weight NaN": (lambda: loss(kl_weight=math.nan), ValueError, r"kl_weight: expected a finite number"),
    "weight bool": (lambda: loss(dice_weight=True), TypeError, r"dice_weight: expected a number, got bool"),
    "dice": (lambda: loss(dice="hard"), ValueError, r"dice: expected one of adaptive_tversky, soft"),
    "compat": (lambda: loss(compat="paper"), ValueError, r"compat: expected one of official"),
    "measures unknown": (lambda: uncertainty(measures=("variance",)), ValueError, r"measures: expected one of"),
    "measures none": (lambda: uncertainty(measures=()), ValueError, r"measures: expected one or more"),
    "measures twice": (lambda: uncertainty(measures=("vacuity",) * 2), ValueError, r"measures: .*different"),
    "image integer": (lambda: sk.gradient_magnitude(X.long()), TypeError, r"image: expected float32"),
    "operator": (lambda: sk.gradient_magnitude(X, operator="canny"), ValueError, r"operator: expected one of"),
    "padding": (lambda: sk.gradient_magnitude(X, padding_mode="wrap"), ValueError, r"padding_mode: expected one of"),
    "spacing length": (lambda: sk.gradient_magnitude(X, spacing=(1, 1, 1)), ValueError, r"spacing: expected 2 numbers"),
    "spacing negative": (lambda: sk.gradient_magnitude(X, spacing=(1, -1)), ValueError, r"spacing: expected positive"),
    "eps": (lambda: sk.gradient_magnitude(X, eps=-1.0), ValueError, r"eps: expected a finite number"),
    "no image": (lambda: supervised(None), TypeError, r"image: expected a torch.Tensor"),
    "image shape": (lambda: supervised(X[..., :4]), ValueError, r"image: expected shape \(2, 'M', 4, 5\)"),
    "gradient shape": (lambda: supervised(gradient=X[:1]), ValueError, r"gradient: expected shape \(2, 1, 4, 5\)"),
    "band dtype": (lambda: supervised(band=X), TypeError, r"band: expected uint8"),
    "band values": (lambda: supervised(band=torch.full_like(Y, 9, dtype=torch.uint8)), ValueError, r"band: .*0 to 3"),
    "distance integer": (lambda: supervised(distance=Y), TypeError, r"distance: expected a floating-point map"),
    "relation": (lambda: supervised(relation="positive"), ValueError, r"relation: expected one of decreasing"),
    "supervision": (lambda: supervised(supervision="sampled"), ValueError, r"supervision: expected one of"),
    "margin": (
        lambda: supervised(supervision="correlation", margin=1.5),
        ValueError,
        r"margin: expected .* 0 to 1, got",
    ),
    "margin alone": (lambda: supervised(margin=0.1), ValueError, r"margin: expected supervision='correlation'"),
    "module margin": (lambda: sk.SURELoss(margin=0.1), ValueError, r"margin: expected supervision='correlation'"),
    "thresholds": (lambda: supervised(near=1.0, boundary=2.0), ValueError, r"boundary, near, far: expected"),
    "distance of floats": (lambda: sk.boundary_distance(X), TypeError, r"target: expected an integer index map"),
    "distance with a channel": (
        lambda: sk.boundary_distance(torch.zeros((2, 1, 3, 4, 5), dtype=torch.long)),
        ValueError,
        r"target: expected shape \(N, \*spatial\) with 2 or 3 spatial axes; with a channel axis also spatial_dims=3",
    ),
    "distance of one-hot": (
        lambda: sk.boundary_distance(torch.zeros((2, 3, 4, 5), dtype=torch.long), spatial_dims=2),
        ValueError,
        r"target: expected shape",
    ),
    "max_distance": (lambda: sk.boundary_distance(Y, max_distance=-1.0), ValueError, r"max_distance: expected"),
    "values of one set": (lambda: ranking(torch.zeros(5)), ValueError, r"values: expected shape \(N, n\)"),
    "values empty": (lambda: ranking(torch.zeros((2, 0))), ValueError, r"values: .*without empty axes"),
    "values integer": (lambda: ranking(Y), TypeError, r"values: expected float32"),
    "scores shape": (lambda: ranking(scores=X[:1]), ValueError, r"scores: expected shape \(2, 1, 4, 5\) like values"),
    "scores NaN": (lambda: ranking(X + torch.arange(5), X * math.nan), ValueError, r"scores: expected finite"),
    "ranked NaN": (lambda: ranking(X * math.nan, X), ValueError, r"values: expected finite numbers at counted points"),
    "groups float": (lambda: ranking(groups=X), TypeError, r"groups: expected an integer dtype"),
    "ranking mask": (lambda: ranking(mask=X + 2), ValueError, r"mask: expected only 0 and 1"),
    "method": (lambda: ranking(method="all"), ValueError, r"method: expected one of exact, sampled, covariance"),
    "num_pairs": (lambda: ranking(method="sampled", num_pairs=0), ValueError, r"num_pairs: expected at least 1"),
    "generator": (lambda: ranking(method="sampled", generator=1), TypeError, r"generator: expected a torch.Generator"),
    "official covariance": (
        lambda: ranking(method="covariance", compat="official"),
        ValueError,
        r"compat: expected None for method='covariance'",
    ),
    "uncertainty of channels": (
        lambda: sk.gradient_uncertainty_loss(Z, Z, Z),
        ValueError,
        r"uncertainty: expected shape \(N, 1, \*spatial\)",
    ),
    "distance shape": (
        lambda: sk.gradient_uncertainty_loss(X, X, X[:, :, :2]),
        ValueError,
        r"distance: expected shape \(2, 1, 4, 5\) like uncertainty",
    ),
    "integer gradient": (lambda: sk.gradient_uncertainty_loss(X, Y, X), TypeError, r"gradient: expected a floating"),
    "noisy single": (lambda: noise(noisy=X.bool()), TypeError, r"noisy\[0\]: expected float32"),
    "noisy number": (lambda: noise(noisy=1.0), TypeError, r"noisy: expected a sequence of maps, got float"),
    "noisy none": (lambda: noise(noisy=[], levels=[]), ValueError, r"noisy: expected one or more maps, got none"),
    "noisy shape": (
        lambda: noise(noisy=[X, X[:1]]),
        ValueError,
        r"noisy\[1\]: expected shape \(2, 1, 4, 5\) like clean",
    ),
    "noisy dtype": (lambda: noise(noisy=[X, X.double()]), TypeError, r"noisy\[1\]: expected torch.float32 like clean"),
    "clean channels": (lambda: noise(Z), ValueError, r"clean: expected shape \(N, 1, \*spatial\), got \(2, 3, 4, 5\)"),
    "levels number": (lambda: noise(levels=0.3), TypeError, r"levels: expected a sequence of numbers"),
    "levels few": (lambda: noise(levels=[0.3]), ValueError, r"levels: expected 2 numbers, one per noisy map, got 1"),
    "levels words": (lambda: noise(levels=["a", "b"]), TypeError, r"levels\[0\]: expected a number, got str"),
    "levels NaN": (lambda: noise(levels=[0.3, math.nan]), ValueError, r"levels\[1\]: expected a finite number"),
    "levels shape": (
        lambda: noise(levels=torch.zeros(2, 3)),
        ValueError,
        r"levels\[0\]: expected a number or shape \(2,\)",
    ),
    "levels infinite": (lambda: noise(levels=torch.tensor([0, math.inf])), ValueError, r"levels\[1\]: expected finite"),
    "noise distance shape": (lambda: noise(distance=X[:1]), ValueError, r"distance: expected shape \(2, 1, 4, 5\)"),
    "noise distance integer": (lambda: noise(distance=Y), TypeError, r"distance: expected a floating-point map"),
    "noise mask": (lambda: noise(mask=Y + 2), ValueError, r"mask: expected only 0 and 1"),
    "noise groups": (lambda: noise(groups=X), TypeError, r"groups: expected an integer dtype"),
    "points float": (lambda: noise(points=torch.zeros(2, 1, 2)), TypeError, r"points: expected integer coordinates"),
    "points axes": (
        lambda: noise(points=torch.zeros((2, 1, 3), dtype=torch.long)),
        ValueError,
        r"points: expected shape \(2, 'P', 2\), got \(2, 1, 3\)",
    ),
    "points outside": (
        lambda: noise(points=torch.tensor([[[0, 0], [1, 5]], [[0, 0], [-1, -1]]])),
        ValueError,
        r"points: expected coordinates in \[0, 4\] along axis 1, or -1, got -1 to 5",
    ),
    "near": (lambda: noise(near=-1.0), ValueError, r"near: expected a finite number"),
    "weights few": (
        lambda: noise(weights=(1, 1)),
        ValueError,
        r"weights: expected 3 numbers, of L_mu, L_d and L_far, got \(1, 1\)",
    ),
    "weights negative": (lambda: noise(weights=(1, -1, 1)), ValueError, r"weights\[1\]: expected a finite number"),
    "pairs without soft": (lambda: noise(pairs=Y), ValueError, r"pairs: expected None without soft"),
    "soft no thresholds": (lambda: noise(soft=True), TypeError, r"soft: expected SoftThresholds, got bool"),
    "soft alpha": (lambda: noise(soft=sk.SoftThresholds(alpha=0.0)), ValueError, r"soft.alpha: expected .* above 0"),
    "soft window": (
        lambda: noise(soft=sk.SoftThresholds(patch_kernel=4)),
        ValueError,
        r"soft.patch_kernel: expected an odd number, got 4",
    ),
    "soft points": (
        lambda: noise(soft=sk.SoftThresholds(), points=torch.zeros((2, 1, 2), dtype=torch.long)),
        ValueError,
        r"points: expected None with soft",
    ),
    "soft pairs float": (lambda: noise(soft=sk.SoftThresholds(), pairs=X), TypeError, r"pairs: expected integers"),
    "soft pairs shape": (
        lambda: noise(soft=sk.SoftThresholds(), pairs=Y),
        ValueError,
        r"pairs: expected shape \(P, 2\)",
    ),
    "soft pairs outside": (
        lambda: noise(soft=sk.SoftThresholds(), pairs=torch.tensor([[0, 40]])),
        ValueError,
        r"pairs: expected positions in \[0, 39\], got 0 to 40",
    ),
    "soft num_pairs": (
        lambda: noise(soft=sk.SoftThresholds(), num_pairs=0),
        ValueError,
        r"num_pairs: expected at least 1",
    ),
    "soft generator": (
        lambda: noise(soft=sk.SoftThresholds(), generator=0),
        TypeError,
        r"generator: expected a torch.Gen",
    ),
    "patch even": (
        lambda: patches(patch_size=2),
        ValueError,
        r"patch_size: expected an odd number of at most 4, got 2",
    ),
    "patch large": (
        lambda: patches(patch_size=5),
        ValueError,
        r"patch_size: expected an odd number of at most 4, got 5",
    ),
    "patch float": (lambda: patches(patch_size=3.0), TypeError, r"patch_size: expected an int, got float"),
    "patches none": (
        lambda: patches(patches_per_class=0),
        ValueError,
        r"patches_per_class: expected at least 1, got 0",
    ),
    "mean_range order": (
        lambda: patches(mean_range=(1, 0)),
        ValueError,
        r"mean_range: expected two finite numbers in order",
    ),
    "mean_range one": (lambda: patches(mean_range=(1, 0, 2)), ValueError, r"mean_range: expected 2 numbers"),
    "std": (lambda: patches(std=-0.1), ValueError, r"std: expected a finite number"),
    "patches of a gradient": (
        lambda: patches(X.clone().requires_grad_()),
        ValueError,
        r"image: requires a gradient",
    ),
    "patches target": (lambda: patches(target=X), TypeError, r"target: expected integer labels of shape \(2, 4, 5\)"),
    "patches label": (
        lambda: patches(target=Y - 1),
        ValueError,
        r"target: expected labels from 0 or ignore_index=-100",
    ),
    "patches classes": (
        lambda: patches(target=Y + 2, num_classes=2),
        ValueError,
        r"target: expected labels in \[0, 1\]",
    ),
    "patches one class": (lambda: patches(num_classes=1), ValueError, r"num_classes: expected at least 2, got 1"),
    "hard": (lambda: patches(hard=X + 0.5), ValueError, r"hard: expected only 0 and 1"),
    "hard none": (lambda: patches(hard=None), TypeError, r"hard: expected a torch.Tensor, got None"),
    "hard shape": (lambda: patches(hard=X[:1]), ValueError, r"hard: expected shape \(2, 1, 4, 5\) like image"),
    "patches generator": (lambda: patches(generator=3), TypeError, r"generator: expected a torch.Generator, got int"),
    "noise std": (lambda: sk.add_gaussian_noise(X, std=-1.0), ValueError, r"std: expected a finite number"),
    "hard shapes": (lambda: sk.hard_sample_mask(X, X[:1]), ValueError, r"noised: expected shape \(2, 1, 4, 5\)"),
    "backend": (lambda: sk.set_backend("cuda"), ValueError, r"backend: expected one of auto, triton"),
    "epoch": (lambda: sk.SURELoss().set_epoch(-1), ValueError, r"epoch: expected a finite number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


# Only values are wrong, which are then not read.
VALUES = {
    "band values", "hard", "label negative", "label too large", "levels infinite", "mask values", "noise mask",
    "patches classes", "patches label", "points outside", "ranked NaN", "ranking mask", "scores NaN",
    "soft pairs outside",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD.keys() - VALUES))
def test_bad_input_after_good(name, monkeypatch):
    """What passed before lets nothing else pass."""
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
    band = torch.zeros_like(Y, dtype=torch.uint8)
    for _ in range(2):
        loss()
        loss(mask=Y.bool(), class_weight=(1.0, 1.0, 1.0))
        supervised()
        supervised(band=band)
        supervised(None, gradient=X)
    test_bad_input(name)


class Counted:
    """A check that lets everything pass, and how often it was asked."""

    def __init__(self):
        self.times = 0
        self.check = unless_alike(self._check)

    def _check(self, tensors, **options):
        self.times += 1
        x, y, mask = tensors
        return (x, y.squeeze(1), mask if mask is None else mask != 0), options

    def asked(self, *tensors, reading=False, **options):
        before = self.times
        (x, y, mask), found = self.check(reading, (*tensors, None)[:3], **options)
        assert x is tensors[0]
        assert y.is_set_to(tensors[1].squeeze(1))
        assert (mask is None) == (len(tensors) < 3)
        assert found == options
        return self.times > before


def test_what_passed_is_not_checked_again():
    counted, x, y = Counted(), torch.zeros((2, 3, 4)), torch.zeros((2, 1, 4))
    options = {"weight": 1.0, "prior": (1.0, 2.0)}
    assert counted.asked(x, y, **options)
    assert not counted.asked(torch.ones_like(x), torch.ones_like(y), **options)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros((2, 3, 5))},
        {"x": torch.zeros((2, 3, 4), dtype=torch.float64)},
        {"x": torch.zeros((2, 3, 4), device="meta")},
        {"x": torch.zeros((2, 3, 4), requires_grad=True)},
        {"x": torch.zeros((2, 3, 4)).to_sparse()},
        {"weight": 1},
        {"weight": True},
        {"weight": 2.0},
        {"prior": (1.0, True)},
        {"prior": (1.0,)},
    ],
)
def test_what_differs_is_checked(change):
    counted, y = Counted(), torch.zeros((2, 1, 4))
    usual = {"x": torch.zeros((2, 3, 4)), "weight": 1.0, "prior": (1.0, 1.0)}
    x, options = usual["x"], {name: usual[name] for name in ("weight", "prior")}
    assert counted.asked(x, y, **options)
    other = usual | change
    assert counted.asked(other["x"], y, weight=other["weight"], prior=other["prior"])
    assert not counted.asked(x, y, **options)


@pytest.mark.parametrize("why", ["values", "list", "subclass", "made anew"])
def test_what_is_checked_every_time(why):
    counted, x, y = Counted(), torch.zeros((2, 3, 4)), torch.zeros((2, 1, 4))
    given = (x.as_subclass(Subclass) if why == "subclass" else x, y)
    if why == "made anew":
        given += (torch.ones((2, 4)),)
    for _ in range(2):
        assert counted.asked(*given, reading=why == "values", prior=[1.0] if why == "list" else (1.0,))


def test_a_tensor_handed_in_twice(monkeypatch):
    """Which of the two arguments it was for is not to be mistaken in the calls that follow."""
    x, g, z = torch.rand((2, 1, 4, 5)), torch.rand((2, 1, 4, 5)), torch.randn((2, 3, 4, 5))
    y = torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    options = {"band": y, "supervision": "correlation", "margin": 0.97, "gradient_weight": 90.0}

    def losses():
        pairs = (g, g), (x, g), (g, x)
        return [sk.supervised_evidential_loss(z, y, a, gradient=b, **options) for a, b in pairs]

    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
    found = losses()
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "1")
    assert found == losses()


class Subclass(torch.Tensor):
    pass


def test_checks_remembered_are_limited(monkeypatch):
    monkeypatch.setattr("sure_kernels.validation._KEPT", 3)
    counted, x, y = Counted(), torch.zeros((2, 3, 4)), torch.zeros((2, 1, 4))
    for weight in (1.0, 2.0, 3.0, 4.0):
        assert counted.asked(x, y, weight=weight)
    assert not counted.asked(x, y, weight=4.0)
    assert counted.asked(x, y, weight=1.0)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (sk.GradientMagnitude, {"spacing": [1.0, 2.0]}),
        (sk.DirichletUncertainty, {"prior": [1.0, 2.0, 0.5]}),
        (sk.EvidentialLoss, {"prior": [1.0, 2.0, 0.5], "class_weight": [1, 2, 3]}),
        (sk.SURELoss, {"prior": [1.0, 2.0, 0.5], "class_weight": [1, 2, 3], "spacing": [1.0, 2.0]}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, numpy.array])
def test_modules_read_numbers_once(made, options, kind, monkeypatch):
    """A tensor on a GPU would make the host wait at every call, and whoever changes a list changes a training."""
    given = {name: kind(value) for name, value in options.items()}
    module, same = made(**given), made(**{name: tuple(value) for name, value in options.items()})
    for value in given.values():
        if kind is not tuple:
            value[0] = 7
    image = torch.randn((2, 1, 4, 5), generator=torch.Generator().manual_seed(0))
    args = {sk.GradientMagnitude: (image,), sk.DirichletUncertainty: (Z,)}.get(made, (Z, Y))
    for found in (module, same):
        if made is sk.SURELoss:
            found.set_epoch(60)
    kwargs = {"image": image} if made is sk.SURELoss else {}
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("a tensor was read"))
    got, expected = module(*args, **kwargs), same(*args, **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert repr(module) == repr(same)


@pytest.mark.parametrize("prior", [2, 2.0, numpy.float32(2), torch.tensor(2.0)])
def test_modules_take_one_number_for_all(prior):
    assert torch.equal(sk.EvidentialLoss(prior=prior)(Z, Y), loss(prior=2.0))


def test_subclasses_are_welcome():
    from monai.data import MetaTensor

    expected = loss()
    got = loss(MetaTensor(Z), MetaTensor(Y))
    assert torch.equal(torch.as_tensor(got), expected)
    assert type(got) is torch.Tensor


def test_checks_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
    loss(target=Y + 3)
