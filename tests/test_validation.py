"""Every wrong argument is named, with what came and what was expected, before any work starts."""

from __future__ import annotations

import math

import pytest
import torch

import sure_kernels as sk

Z = torch.zeros((2, 3, 4, 5))
Y = torch.zeros((2, 4, 5), dtype=torch.long)
X = torch.zeros((2, 1, 4, 5))


def loss(logits=Z, target=Y, **options):
    return sk.evidential_loss(logits, target, **options)


def supervised(image=X, **options):
    return sk.supervised_evidential_loss(Z, Y, image, **options)


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
        r"target: expected integer labels of shape \(2, 4, 5\)",
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
    "thresholds": (lambda: supervised(near=1.0, boundary=2.0), ValueError, r"boundary, near, far: expected"),
    "distance of floats": (lambda: sk.boundary_distance(X), TypeError, r"target: expected an integer index map"),
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
    "backend": (lambda: sk.set_backend("cuda"), ValueError, r"backend: expected one of auto, triton"),
    "epoch": (lambda: sk.SURELoss().set_epoch(-1), ValueError, r"epoch: expected a finite number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_subclasses_are_welcome():
    from monai.data import MetaTensor

    expected = loss()
    got = loss(MetaTensor(Z), MetaTensor(Y))
    assert torch.equal(torch.as_tensor(got), expected)
    assert type(got) is torch.Tensor


def test_checks_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
    loss(target=Y + 3)
