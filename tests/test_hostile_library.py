"""What a careless or malicious caller passes: an error that names the argument, or the result that is documented.

Simple wrong arguments are in `test_validation`; here are those that once went through unseen, late or unexplained.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch

import sure_kernels as sk
from sure_kernels import metrics

DOCS = Path(__file__).parents[1] / "docs" / "reliability.md"
NAN, INF = math.nan, math.inf
GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn((2, 3, 4, 5), generator=GENERATOR)
Y = torch.randint(0, 3, (2, 4, 5), generator=GENERATOR)
X = torch.rand((2, 1, 4, 5), generator=GENERATOR)
P = Z.softmax(1)
E = (X > 0.5).long()
D, ZERO, G = torch.full_like(X, 3.0), torch.zeros_like(X), X.flip(0)
ONE_HOT = torch.nn.functional.one_hot(Y, 3).movedim(-1, 1)
SOFT = sk.SoftThresholds()
HUGE = 10**5000


def spoilt(tensor, value=NAN, at=0):
    tensor = tensor.contiguous().clone()
    tensor.view(-1)[at] = value
    return tensor


def loss(logits=Z, target=Y, **options):
    return sk.evidential_loss(logits, target, **options)


def supervised(image=X, **options):
    return sk.supervised_evidential_loss(Z, Y, image, **options)


def gu(u=X, g=G, d=ZERO, **options):
    return sk.gradient_uncertainty_loss(u, g, d, **options)


def noise(clean=X, noisy=(X + 0.1, X + 0.2), levels=(0.3, 0.7), distance=D, **options):
    return sk.noise_uncertainty_loss(clean, noisy, levels, distance, **options)


def patches(image=X, target=Y, distance=D, hard=E, **options):
    return sk.sample_noise_patches(image, target, distance, hard, **options)


def sure(inputs=None, **options):
    """SURELoss in an epoch that is supervised."""
    criterion = sk.SURELoss(**options)
    criterion.set_epoch(60)
    return criterion(Z, Y, **{"image": X, **(inputs or {})})


def response(maps=(X, X), levels=(0.0, 1.0), distance=D, **options):
    return metrics.noise_response(maps, levels, distance=distance, **options)


T, V = TypeError, ValueError
BAD = {
    # not a dense tensor of real numbers
    "sparse logits": (lambda: loss(Z.to_sparse()), T, r"logits: expected a dense tensor, got a torch.sparse_coo one"),
    "sparse target": (lambda: loss(target=Y.to_sparse()), T, r"target: expected a dense tensor"),
    "sparse image": (lambda: sk.gradient_magnitude(X.to_sparse()), T, r"image: expected a dense tensor"),
    "nested logits": (
        lambda: loss(torch.nested.nested_tensor([Z[0], Z[1]])),
        T,
        r"logits: expected a dense tensor.*nest",
    ),
    "complex logits": (lambda: loss(Z + 0j), T, r"logits: expected float32.*got torch.complex64"),
    "eight-bit logits": (lambda: loss(Z.to(torch.float8_e4m3fn)), T, r"logits: expected float32.*got torch.float8"),
    "numpy logits": (lambda: loss(Z.numpy()), T, r"logits: expected a torch.Tensor, got ndarray"),
    "logits elsewhere": (lambda: loss(Z.to("meta")), V, r"target: expected device meta like logits, got cpu"),
    "complex one-hot": (lambda: loss(target=ONE_HOT + 0j), T, r"target: expected booleans, integers or real numbers"),
    "complex mask": (lambda: loss(mask=X + 0j), T, r"mask: expected booleans, integers or real numbers"),
    "complex error": (
        lambda: metrics.error_detection_auroc(X, E + 0j),
        T,
        r"error: expected booleans, integers or real numbers, got torch.complex64",
    ),
    "complex levels": (lambda: noise(levels=torch.tensor([1j, 2j])), T, r"levels\[0\]: expected real numbers"),
    "boolean levels": (lambda: noise(levels=torch.tensor([True, False])), T, r"levels\[0\]: expected real numbers"),
    # values
    "NaN logit": (lambda: loss(spoilt(Z)), V, r"logits: expected finite values.*in 1 of them, first at .* \(0, 0, 0\)"),
    "NaN logit, weights 0": (
        lambda: loss(spoilt(Z), ace_weight=0, kl_weight=0, dice_weight=0),
        V,
        r"logits: expected finite values",
    ),
    "infinite logit": (lambda: loss(spoilt(Z, INF)), V, r"logits: expected finite values in counted voxels"),
    "half overflow": (lambda: loss((Z * 1e6).half()), V, r"logits: expected finite values in counted voxels"),
    "NaN image": (lambda: supervised(spoilt(X)), V, r"image: expected finite values.*got NaN or infinity"),
    "infinite image": (lambda: supervised(spoilt(X, INF)), V, r"image: expected finite values"),
    "NaN gradient": (lambda: supervised(None, gradient=spoilt(X)), V, r"gradient: expected finite values"),
    "NaN image, exact": (lambda: supervised(spoilt(X), supervision="exact"), V, r"image: expected finite values"),
    "overflow of the loss": (
        lambda: loss(ace_weight=3e38),
        V,
        r"logits: expected a loss that torch.float32 .* got inf",
    ),
    "negative distance": (
        lambda: supervised(distance=-D),
        V,
        r"distance: expected distances of at least 0, got -3 and the like at 40 voxels \(a signed distance map\?\)",
    ),
    "negative distance, ranking": (lambda: gu(d=-D), V, r"distance: expected distances of at least 0, got -3"),
    "negative distance, noise": (lambda: noise(distance=-D), V, r"distance: expected distances of at least 0"),
    "negative distance, soft": (
        lambda: noise(distance=-D, soft=SOFT),
        V,
        r"distance: expected distances of at least 0",
    ),
    "negative distance, patches": (lambda: patches(distance=-D), V, r"distance: expected distances of at least 0"),
    "negative distance, metric": (lambda: response(distance=-D), V, r"distance: expected distances of at least 0"),
    "NaN in a covariance": (
        lambda: sk.pairwise_ranking_loss(spoilt(X), X.flip(0), method="covariance"),
        V,
        r"values: expected finite numbers at counted points, got 1",
    ),
    "NaN uncertainty": (lambda: gu(spoilt(X)), V, r"uncertainty: expected finite numbers"),
    "NaN gradient, ranking": (lambda: gu(g=spoilt(X)), V, r"gradient: expected finite numbers"),
    "NaN gradient, soft": (lambda: gu(g=spoilt(X), soft=SOFT), V, r"gradient: expected finite values"),
    "NaN in a noised map": (lambda: noise(noisy=(spoilt(X), X)), V, r"noisy\[0\]: expected finite values"),
    "soft one-hot": (lambda: loss(target=P), V, r"target: .*read as one-hot, expected a single 1 .* at 40 of them"),
    "NaN one-hot": (lambda: loss(target=spoilt(ONE_HOT.float())), V, r"target: .*something else at 1 of them"),
    "NaN mask": (lambda: loss(mask=spoilt(torch.ones(2, 4, 5))), V, r"mask: expected only 0 and 1, got nan"),
    "uint64 that wraps to ignore_index": (
        lambda: loss(target=torch.full((2, 4, 5), 2**64 - 100, dtype=torch.uint64)),
        V,
        r"target: expected values below 2\^63, got larger ones in 40 places",
    ),
    "uint64 groups": (
        lambda: sk.pairwise_ranking_loss(X, X, groups=torch.full((2, 4, 5), 2**64 - 1, dtype=torch.uint64)),
        V,
        r"groups: expected values below 2\^63",
    ),
    "infinite level": (lambda: response(levels=torch.tensor([0.0, INF])), V, r"levels\[1\]: expected finite numbers"),
    # options
    "prior of bytes": (lambda: loss(prior=b"abc"), T, r"prior: expected one number or 3, got bytes"),
    "prior by name": (lambda: loss(prior={0: 1.0, 1: 1.0, 2: 1.0}), T, r"prior: expected one number or 3, got dict"),
    "prior without order": (lambda: loss(prior={1.0, 2.0, 3.0}), T, r"prior: expected one number or 3, got set"),
    "prior beyond float32": (lambda: loss(prior=1e300), V, r"prior: expected numbers up to 3.4e\+38"),
    "prior of huge integers": (lambda: loss(prior=[HUGE, 1, 1]), V, r"prior: expected finite entries"),
    "learned prior": (lambda: loss(prior=torch.ones(3, requires_grad=True)), V, r"prior: requires a gradient"),
    "learned level": (
        lambda: noise(levels=[torch.tensor(0.3, requires_grad=True), 0.7]),
        V,
        r"levels\[0\]: requires a gradient, but gets none here",
    ),
    "learned target": (lambda: loss(target=ONE_HOT.float().requires_grad_()), V, r"target: requires a gradient"),
    "learned mask": (lambda: loss(mask=torch.ones(2, 4, 5).requires_grad_()), V, r"mask: requires a gradient"),
    "0-d class_weight": (lambda: loss(class_weight=torch.tensor(1.0)), T, r"class_weight: expected 3 numbers"),
    "weight beyond float32": (lambda: loss(ace_weight=1e300), V, r"ace_weight: expected a number up to 3.4e\+38"),
    "weight of 5000 digits": (lambda: loss(ace_weight=HUGE), V, r"ace_weight: expected .* an integer of thousands of"),
    "index of 5000 digits": (
        lambda: loss(ignore_index=HUGE),
        V,
        r"ignore_index: expected a 64-bit integer, got an int",
    ),
    "words for a switch": (lambda: loss(include_background="no"), T, r"include_background: expected True or False"),
    "tensor for a switch": (lambda: loss(include_background=torch.ones(2)), T, r"include_background: expected True or"),
    "words for return_terms": (lambda: loss(return_terms="no"), T, r"return_terms: expected True or False, got str"),
    "words for per_class": (
        lambda: metrics.brier_score(P, Y, per_class="no"),
        T,
        r"per_class: expected True or False, got str",
    ),
    "rank for a process group": (lambda: loss(process_group=0), T, r"process_group: expected a torch.distributed"),
    "process group of a ranking": (lambda: gu(process_group="world"), T, r"process_group: expected a torch.distribut"),
    "process group of a metric": (
        lambda: metrics.ExpectedCalibrationError().compute(3),
        T,
        r"process_group: expected a torch.distributed.ProcessGroup or None, got int",
    ),
    "measures by number": (lambda: sk.dirichlet_uncertainty(Z, measures=3), T, r"measures: expected a tuple of names"),
    "measures without order": (
        lambda: sk.dirichlet_uncertainty(Z, measures={"vacuity", "entropy"}),
        T,
        r"measures: expected a tuple of names, got set",
    ),
    "axes as words": (lambda: sk.boundary_distance(Y, spatial_dims="2"), T, r"spatial_dims: expected an int, got str"),
    "axes as a fraction": (lambda: sk.boundary_distance(Y, spatial_dims=2.0), T, r"spatial_dims: expected an int"),
    "four axes": (lambda: sk.boundary_distance(Y, spatial_dims=4), V, r"spatial_dims: expected 2 or 3, got 4"),
    "spacing and axes at odds": (
        lambda: sk.boundary_distance(Y, spatial_dims=2, spacing=(1, 1, 1)),
        V,
        r"spacing: expected 2 numbers, one per spatial axis, got 3",
    ),
    "more pairs than memory": (
        lambda: sk.pairwise_ranking_loss(X, X, method="sampled", num_pairs=2**62),
        V,
        r"num_pairs: expected at most 2147483647",
    ),
    "window of 2^61 voxels": (
        lambda: gu(soft=sk.SoftThresholds(normal_kernel=2**61 + 1)),
        V,
        r"soft.normal_kernel: expected at most 255",
    ),
    "unused but wrong: method": (lambda: gu(soft=SOFT, method="all"), V, r"method: expected one of exact, sampled"),
    "unused but wrong: near": (lambda: noise(soft=SOFT, near="x"), T, r"near: expected a number, got str"),
    "unused but wrong: num_pairs": (lambda: noise(num_pairs=-1), V, r"num_pairs: expected at least 1, got -1"),
    "2^40 classes": (lambda: patches(num_classes=2**40), V, r"num_classes: expected at most 65536, got 1099511627776"),
    "a label of 2^40": (
        lambda: patches(target=torch.where(Y > 0, 2**40, 0)),
        V,
        r"target: expected at most 21845 classes with 3 patches each, got 1099511627777",
    ),
    "2^40 patches": (lambda: patches(patches_per_class=2**40), V, r"patches_per_class: expected at most 65536"),
    "noise beyond float32": (lambda: patches(std=1e300), V, r"std: expected a number up to 3.4e\+38"),
    # modules say it when they are made, not in the epoch that first uses the option
    "SURELoss relation": (lambda: sk.SURELoss(relation="positive"), V, r"relation: expected one of decreasing"),
    "SURELoss operator": (lambda: sk.SURELoss(operator="canny"), V, r"operator: expected one of sobel"),
    "SURELoss kind": (lambda: sk.SURELoss(kind="ce"), V, r"kind: expected one of digamma"),
    "SURELoss prior": (lambda: sk.SURELoss(prior=[1.0, 1e-4]), V, r"prior: expected finite entries of at least 0.001"),
    "SURELoss spacing": (lambda: sk.SURELoss(spacing=-1), V, r"spacing: expected positive finite numbers"),
    "SURELoss thresholds": (lambda: sk.SURELoss(near=1, boundary=2), V, r"boundary, near, far: expected boundary <="),
    "SURELoss soft": (lambda: sk.SURELoss(soft=True), T, r"soft: expected SoftThresholds, got bool"),
    "SURELoss noise_weights": (
        lambda: sk.SURELoss(noise_weights=(1, NAN, 1)),
        V,
        r"noise_weights\[1\]: expected a fin",
    ),
    "SURELoss within_class": (lambda: sk.SURELoss(within_class=True), V, r"within_class: expected supervision='exact'"),
    "SURELoss compat": (lambda: sk.SURELoss(compat=1), T, r"compat: expected one of official, got int"),
    "SURELoss state": (
        lambda: sk.SURELoss().load_state_dict({"_extra_state": "x"}),
        T,
        r"epoch: expected a torch.Tensor, got str",
    ),
    "EvidentialLoss": (lambda: sk.EvidentialLoss(kind="ce"), V, r"kind: expected one of"),
    "GradientMagnitude": (lambda: sk.GradientMagnitude(eps=-1), V, r"eps: expected a finite number of at least 0"),
    "DirichletUncertainty": (lambda: sk.DirichletUncertainty(measures="variance"), V, r"measures: expected one of"),
    "GradientUncertaintyLoss": (lambda: sk.GradientUncertaintyLoss(relation="x"), V, r"relation: expected one of"),
    "NoiseUncertaintyLoss": (lambda: sk.NoiseUncertaintyLoss(near=-1), V, r"near: expected a finite number"),
    "levels without noise": (
        lambda: sure({"levels": [1, 2]}),
        T,
        r"noisy: expected noised logits with levels, got None",
    ),
    "noise by number": (lambda: sure({"noisy": 3, "levels": [1]}), T, r"noisy: expected a sequence of logits, got int"),
    "noised maps for logits": (
        lambda: sure({"noisy": [X], "levels": [1]}),
        V,
        r"noisy\[0\]: expected shape \(2, 3, 4, 5\) like the clean logits, got \(2, 1, 4, 5\)",
    ),
    # metrics
    "probabilities left out": (lambda: metrics.brier_score(Z, Y), V, r"probability: expected values in \[0, 1\]"),
    "uncertainty left out": (
        lambda: metrics.calibration_error_detection(P, Y, None),
        T,
        r"uncertainty: expected a torch.Tensor, got NoneType",
    ),
    "2^40 bins": (lambda: metrics.reliability_curve(P, Y, num_bins=2**40), V, r"num_bins: expected at most 65536"),
    "no classes": (
        lambda: metrics.ExpectedCalibrationError(num_classes=0),
        V,
        r"num_classes: expected at least 2, got 0",
    ),
    "minus three classes": (lambda: metrics.CalibrationErrorDetection(-3), V, r"num_classes: expected at least 2"),
    "minus two kinds": (lambda: metrics.ErrorDetectionAUROC(num_classes=-2), V, r"num_classes: expected at least 1"),
    "maps by number": (lambda: response(3), T, r"maps: expected a sequence of tensors, got int"),
    "levels by number": (lambda: response(levels=3), T, r"levels: expected a sequence of numbers, got int"),
    "labels for distances": (lambda: response(distance=Y), T, r"distance: expected floating point, got torch.int64"),
    "two levels for three": (
        lambda: metrics.NoiseResponse(num_levels=3).update([X, X], [0.0, 1.0], distance=D),
        V,
        r"levels: expected 3 of them, got 2",
    ),
    "twin's relation": (lambda: metrics.UncertaintyRatio(relation="x"), V, r"relation: expected one of decreasing"),
    "twin's compat": (lambda: metrics.UncertaintyCorrelation(compat="x"), V, r"compat: expected one of official"),
    "mean of no function": (lambda: metrics.CaseMean(3), T, r"function: expected a callable, got int"),
    "mean of bounds": (
        lambda: metrics.CaseMean(metrics.error_detection_auroc).update(sk.dirichlet_uncertainty(Z).vacuity, E),
        T,
        r"function: expected one that returns a torch.Tensor, got Bounded \(with method='exact' it is one\)",
    ),
    "mean of numbers": (lambda: metrics.CaseMean(lambda x: 3.0).update(X), T, r"function: expected one that returns a"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested and sparse tensors, from torch
        with pytest.raises(error, match=message) as raised:
            call()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_what_does_not_count_may_be_anything():
    keep = torch.ones((2, 4, 5))
    keep[0, 0, 0] = 0
    clean, label = loss(mask=keep), torch.where(keep > 0, Y, 99)
    torch.testing.assert_close(loss(spoilt(Z), label, mask=keep), clean)
    hidden = {"mask": keep, "noisy": [Z + 0.1], "levels": [0.5]}
    criterion = sk.SURELoss()
    criterion.set_epoch(60)
    torch.testing.assert_close(criterion(Z, label, image=X, **hidden), criterion(Z, Y, image=X, **hidden))
    negative = torch.where(keep[:, None] > 0, D, -1.0)
    torch.testing.assert_close(supervised(distance=negative, mask=keep), supervised(distance=D, mask=keep))


def test_nothing_that_counts_is_zero_or_undefined():
    none = torch.zeros((2, 4, 5))
    assert float(loss(mask=none)) == 0
    for name in ("expected_calibration_error", "adaptive_calibration_error", "brier_score", "negative_log_likelihood"):
        value, reason = getattr(metrics, name)(P, Y, mask=none, return_reason=True)
        assert value.isnan().all()
        assert set(reason.tolist()) == {metrics.Undefined.NO_VOXEL}
    value, reason = metrics.uncertainty_correlation(X[:0].flatten(), X[:0].flatten(), return_reason=True)
    assert value.isnan()
    assert int(reason) == metrics.Undefined.NO_VOXEL


def test_nan_stays_in_its_voxel():
    maps = sk.dirichlet_uncertainty(spoilt(Z))
    assert int(maps.vacuity.isnan().sum()) == 1
    value, reason = metrics.error_detection_auroc(spoilt(X), E, return_reason=True)
    assert value.value.isnan().tolist() == [True, False]
    assert reason.tolist() == [metrics.Undefined.NAN_INPUT, 0]


def test_the_schedule_ends_at_its_last_epoch():
    criterion = sk.SURELoss(num_epochs=100)
    for epoch in (100, 101, 1e6, 1e30):
        criterion.set_epoch(epoch)
        assert criterion.current_supervision_weight == pytest.approx(1.0)


def test_values_are_not_read_where_checks_are_off(monkeypatch):
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
    assert supervised(distance=-D).isfinite()
    assert loss(spoilt(Z)).isnan()
    assert not response(distance=-D).share.isnan().any()


def test_the_table_of_the_docs_is_this_one():
    text = DOCS.read_text().partition("### Library")[2].partition("###")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if "|" in line]
    tried = [
        (name, f"{error.__name__}: {message.split(':')[0]}".replace("\\", ""))
        for name, (_, error, message) in BAD.items()
    ]
    assert rows[2:] == tried
    assert len(tried) >= 60
