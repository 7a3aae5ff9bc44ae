"""Where metrics are undefined and why, dtypes and layouts, and all of them from one pass."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import EXACT_METRIC

import sure_kernels as sk
from sure_kernels import metrics
from sure_kernels.metrics import Bounded, SegmentationScores, Undefined


def segmentation(seed: int = 0, shape: tuple[int, ...] = (2, 6, 7), k: int = 3):
    """Probability, target and uncertainty of a mediocre network."""
    g = torch.Generator().manual_seed(seed)
    probability = (2 * torch.randn((shape[0], k, *shape[1:]), generator=g)).softmax(1)
    right = torch.rand(shape, generator=g) < 0.7
    target = torch.where(right, probability.argmax(1), torch.randint(k, shape, generator=g))
    return probability, target, (1 - probability.amax(1, keepdim=True)).clamp(0, 1)


def leaves(scores):
    """(name, tensor) of everything in SegmentationScores, with "name.field" for what has several."""
    for name, value in scores._asdict().items():
        if isinstance(value, torch.Tensor):
            yield name, value
        else:
            yield from ((f"{name}.{field}", tensor) for field, tensor in value._asdict().items())


OF_PROBABILITY = {
    "expected_calibration_error": metrics.expected_calibration_error,
    "adaptive_calibration_error": lambda *a, **o: metrics.adaptive_calibration_error(*a, method="histogram", **o),
    "brier_score": metrics.brier_score,
    "negative_log_likelihood": metrics.negative_log_likelihood,
    "reliability": metrics.reliability_curve,
}
OF_ERRORS = {
    "uncertainty_error_overlap": metrics.uncertainty_error_overlap,
    "error_detection_auroc": metrics.error_detection_auroc,
    "error_detection_auprc": metrics.error_detection_auprc,
    "area_under_risk_coverage": metrics.area_under_risk_coverage,
}


class TestOnePass:
    """Everything together is what each function says alone."""

    @pytest.mark.parametrize("shape", [(2, 6, 7), (1, 3, 4, 5)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_is_the_functions(self, shape, masked):
        probability, target, uncertainty = segmentation(1, shape)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
        scores, reasons = metrics.calibration_error_detection(
            probability, target, uncertainty, mask=mask, return_reason=True
        )
        top = probability.argmax(1)
        kinds = torch.stack([(top == k) ^ (target == k) for k in range(3)], 1)
        for suffix, per_class, error in (("", False, top != target), ("_per_class", True, kinds)):
            for name, function in OF_PROBABILITY.items():
                options = {} if name == "reliability" and not per_class else {"per_class": per_class}
                expected = function(probability, target, mask=mask, return_reason=True, **options)
                found = getattr(scores, name + suffix), getattr(reasons, name + suffix)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
            for name, function in OF_ERRORS.items():
                expected = function(uncertainty, error, mask=mask, return_reason=True)
                found = getattr(scores, name + suffix), getattr(reasons, name + suffix)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
            counted = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
            wrong = (error & counted[:, None] if per_class else error & counted).flatten(1 + per_class)
            expected = wrong.sum(-1) / counted.flatten(1).sum(1, keepdim=per_class).double()
            torch.testing.assert_close(getattr(scores, "error_rate" + suffix), expected, rtol=1e-12, atol=0)
        assert scores.voxels.tolist() == counted.flatten(1).sum(1).tolist()

    def test_twin_pools_voxels(self):
        probability, target, uncertainty = segmentation(3, (3, 6, 7))
        pooled = metrics.CalibrationErrorDetection(3)
        assert all(bool(t.isnan().all()) for name, t in leaves(pooled.compute()) if "voxels" not in name)
        for i in range(3):
            part = slice(i, i + 1)
            pooled.update(probability[part], target[part], uncertainty[part])
        joined = metrics.calibration_error_detection(
            probability.transpose(0, 1).reshape(1, 3, 18, 7), target.reshape(1, 18, 7), uncertainty.reshape(1, 18, 7)
        )
        for (name, found), (_, expected) in zip(leaves(pooled.compute()), leaves(joined), strict=True):
            torch.testing.assert_close(found, expected[0], rtol=1e-12, atol=1e-15, equal_nan=True, msg=name)
        with pytest.raises(ValueError, match="probability: expected 3 classes, got 4"):
            pooled.update(*segmentation(k=4))
        pooled.reset()
        assert float(pooled.compute().voxels) == 0

    def test_reasons_say_where_nan_is(self):
        probability, target, uncertainty = segmentation(4)
        mask = torch.ones(2, 6, 7, dtype=torch.bool)
        mask[1] = False
        scores, reasons = metrics.calibration_error_detection(
            probability, target, uncertainty, mask=mask, return_reason=True
        )
        for (name, value), (_, reason) in zip(leaves(scores), _matching(scores, reasons), strict=True):
            if "voxels" not in name:
                assert torch.equal(value.isnan(), reason != 0), name
        assert float(scores.error_rate[0]) > 0
        assert int(reasons.error_rate[1]) == Undefined.NO_VOXEL

    def test_errors(self):
        probability, target, uncertainty = segmentation()
        with pytest.raises(ValueError, match=r"uncertainty: expected shape \(2, 1, 6, 7\), got \(2, 6, 6\)"):
            metrics.calibration_error_detection(probability, target, uncertainty[:, 0, :, :6])
        with pytest.raises(TypeError, match="uncertainty: expected float32"):
            metrics.calibration_error_detection(probability, target, target)
        with pytest.raises(ValueError, match="num_bins: expected at least 1, got 0"):
            metrics.calibration_error_detection(probability, target, uncertainty, num_bins=0)


def _matching(scores, reasons):
    """Leaves of the reasons, repeated where one reason stands for the fields of a result."""
    for name, value in scores._asdict().items():
        reason = getattr(reasons, name)
        if isinstance(value, torch.Tensor) or not isinstance(reason, torch.Tensor):
            yield name, reason
        else:
            yield from ((name, reason if part != "voxels" else None) for part in value._fields)


def one_case(probability, target, uncertainty, **options) -> tuple[SegmentationScores, SegmentationScores]:
    return metrics.calibration_error_detection(probability, target, uncertainty, return_reason=True, **options)


class TestEdges:
    """Each edge once, on the one pass; the functions are tied to it above."""

    def test_perfect_prediction(self):
        target = torch.arange(12).reshape(1, 3, 4) % 3
        probability = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
        scores, reasons = one_case(probability, target, torch.rand(1, 1, 3, 4))
        for name in ("error_rate", "expected_calibration_error", "brier_score", "negative_log_likelihood"):
            assert float(getattr(scores, name)) == 0, name
        assert float(scores.adaptive_calibration_error.value) <= float(scores.adaptive_calibration_error.bound) < 1e-6
        assert float(scores.area_under_risk_coverage.value) == 0
        for name in ("uncertainty_error_overlap", "error_detection_auroc", "error_detection_auprc"):
            assert int(getattr(reasons, name)) == Undefined.NO_ERROR, name

    def test_all_wrong(self):
        target = torch.zeros(1, 3, 4, dtype=torch.long)
        probability = torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 3, 4)
        scores, reasons = one_case(probability, target, torch.rand(1, 1, 3, 4))
        assert float(scores.error_rate) == float(scores.expected_calibration_error) == 1
        assert float(scores.brier_score) == 2
        assert float(scores.negative_log_likelihood) == math.inf
        assert float(scores.error_detection_auprc.value) == float(scores.area_under_risk_coverage.value) == 1
        assert int(reasons.error_detection_auroc) == Undefined.ALL_ERRORS
        assert not any(int(r) for r in (reasons.error_detection_auprc, reasons.negative_log_likelihood))

    def test_one_class_absent(self):
        probability, target, uncertainty = segmentation(5)
        target[target == 2] = 0
        scores, reasons = one_case(probability, target, uncertainty)
        assert (reasons.negative_log_likelihood_per_class[:, 2] == Undefined.CLASS_ABSENT).all()
        assert scores.negative_log_likelihood_per_class[:, 2].isnan().all()
        # Whether the class is there is still a question that its probability answers.
        mean = probability[:, 2].double().flatten(1).mean(1)
        square = probability[:, 2].double().square().flatten(1).mean(1)
        torch.testing.assert_close(scores.expected_calibration_error_per_class[:, 2], mean)
        torch.testing.assert_close(scores.brier_score_per_class[:, 2], square)
        assert not reasons.negative_log_likelihood.any()

    @pytest.mark.parametrize("empty", ["mask", "ignored"])
    def test_nothing_counts(self, empty):
        probability, target, uncertainty = segmentation(6)
        mask = torch.zeros(2, 6, 7, dtype=torch.bool) if empty == "mask" else None
        if empty == "ignored":
            target.fill_(-100)
        scores, reasons = one_case(probability, target, uncertainty, mask=mask)
        for (name, value), (_, reason) in zip(leaves(scores), _matching(scores, reasons), strict=True):
            if "voxels" in name:
                assert not value.any(), name
                continue
            assert value.isnan().all(), name
            expected = Undefined.CLASS_ABSENT if name == "negative_log_likelihood_per_class" else Undefined.NO_VOXEL
            assert (reason == expected).all(), name

    @pytest.mark.parametrize("level", [0.0, 0.25, 0.3, 1.0])
    def test_constant_uncertainty(self, level):
        probability, target, _ = segmentation(7)
        u = torch.full((2, 1, 6, 7), level)
        error = probability.argmax(1) != target
        rate = error.flatten(1).double().mean(1)
        for method in ("exact", "histogram"):
            found = [f(u, error, method=method) for f in list(OF_ERRORS.values())[1:]]
            auroc, auprc, aurc = (t.value if isinstance(t, Bounded) else t for t in found)
            torch.testing.assert_close(auroc, torch.full_like(rate, 0.5))
            torch.testing.assert_close(auprc, rate)
            torch.testing.assert_close(aurc, rate)  # the expected risk is the error rate at every coverage
        overlap = metrics.uncertainty_error_overlap(u, error)
        torch.testing.assert_close(overlap, 2 * rate / (1 + rate) if level > 0.01 else torch.zeros_like(rate))
        for function in (metrics.uncertainty_correlation, metrics.uncertainty_ratio):
            value, reason = function(u, torch.rand(2, 1, 6, 7), return_reason=True)
            assert value.isnan().all()
            assert (reason == (Undefined.CONSTANT if "corr" in function.__name__ else Undefined.NO_PAIR)).all()

    @pytest.mark.parametrize("wrong", [False, True])
    def test_one_voxel(self, wrong):
        probability = torch.tensor([0.3, 0.7]).reshape(1, 2, 1, 1)
        target = torch.tensor([[[0 if wrong else 1]]])
        scores, reasons = one_case(probability, target, torch.full((1, 1, 1, 1), 0.4))
        assert float(scores.expected_calibration_error) == pytest.approx(0.7 if wrong else 0.3)
        assert float(scores.brier_score) == pytest.approx(2 * (0.49 if wrong else 0.09))
        assert float(scores.negative_log_likelihood) == pytest.approx(-math.log(0.3 if wrong else 0.7))
        assert float(scores.area_under_risk_coverage.value) == wrong
        expected = Undefined.ALL_ERRORS if wrong else Undefined.NO_ERROR
        assert int(reasons.error_detection_auroc) == expected
        assert int(reasons.uncertainty_error_overlap) == (0 if wrong else Undefined.NO_ERROR)
        one = torch.tensor([0.5])
        for function in (metrics.uncertainty_correlation, metrics.uncertainty_ratio):
            assert int(function(one, one, return_reason=True)[1]) == Undefined.FEW_POINTS

    @pytest.mark.parametrize("where", ["probability", "uncertainty"])
    def test_nan_is_never_a_number(self, where):
        probability, target, uncertainty = segmentation(8)
        (probability if where == "probability" else uncertainty)[1, 0, 2, 3] = torch.nan
        scores, reasons = one_case(probability, target, uncertainty)
        for (name, value), (_, reason) in zip(leaves(scores), _matching(scores, reasons), strict=True):
            if "voxels" in name or (where == "uncertainty" and name.split("_per")[0].split(".")[0] in OF_PROBABILITY):
                continue
            assert value[1].isnan().all(), name
            assert (reason[1] == Undefined.NAN_INPUT).all(), name
        assert float(scores.error_rate[0]) > 0
        # Where the voxel does not count it does no harm.
        mask = torch.ones(2, 6, 7, dtype=torch.bool)
        mask[1, 2, 3] = False
        masked, _ = one_case(probability, target, uncertainty, mask=mask)
        assert not masked.brier_score.isnan().any()
        assert not masked.error_detection_auroc.value.isnan().any()

    def test_nan_among_ranks_and_levels(self):
        x, y = torch.rand(2, 2, 9)
        y[0, 3] = torch.nan
        for function in (metrics.uncertainty_correlation, metrics.uncertainty_ratio):
            for groups in (None, torch.arange(9).expand(2, -1) % 2):
                value, reason = function(x, y, groups=groups, return_reason=True)
                assert value.isnan().tolist() == [True, False]
                assert reason.tolist() == [Undefined.NAN_INPUT, 0]
        near = torch.zeros(2, 9)
        response, reason = metrics.noise_response([x, y, x], [0.1, 0.2, 0.4], distance=near, return_reason=True)
        assert response.correlation.isnan().tolist() == [True, False]
        assert reason.share.tolist() == [[Undefined.NAN_INPUT] * 2, [0, 0]]
        for kind in ("exact", "histogram"):
            value, reason = metrics.error_detection_auroc(y, x < 0.5, method=kind, return_reason=True)
            assert (value.value if kind == "histogram" else value).isnan().tolist() == [True, False]
            assert reason.tolist() == [Undefined.NAN_INPUT, 0]

    def test_noise_response_undefined(self):
        u = [torch.rand(1, 8) for _ in range(3)]
        near, far = torch.zeros(1, 8), torch.full((1, 8), 9.0)

        def reasons(maps, levels, distance):
            response, reason = metrics.noise_response(maps, levels, distance=distance, return_reason=True)
            assert torch.equal(response.share.isnan(), reason.share != 0)
            assert torch.equal(response.correlation.isnan(), reason.correlation != 0)
            return reason.share[0].tolist(), int(reason.correlation[0])

        assert reasons(u, [0.1, 0.2, 0.3], near) == ([0, 0], 0)
        assert reasons(u, [0.1, 0.2, 0.3], far) == ([Undefined.NO_VOXEL] * 2, Undefined.NO_VOXEL)
        assert reasons(u[:2], [0.1, 0.2], near) == ([0], Undefined.FEW_LEVELS)
        assert reasons([u[0]] * 3, [0.1, 0.2, 0.3], near) == ([0, 0], Undefined.CONSTANT)
        assert reasons(u, [0.2, 0.2, 0.2], near) == ([Undefined.CONSTANT] * 2, Undefined.CONSTANT)

    def test_sorted_adaptive_error(self):
        probability, target, _ = segmentation(9)
        mask = torch.ones(2, 6, 7, dtype=torch.bool)
        mask[0] = False
        for per_class in (False, True):
            value, reason = metrics.adaptive_calibration_error(
                probability, target, per_class=per_class, mask=mask, return_reason=True
            )
            assert (reason[0] == Undefined.NO_VOXEL).all()
            assert value[0].isnan().all()
            assert not value[1].isnan().any()
            broken = probability.clone()
            broken[1, 1, 0, 0] = torch.nan
            value, reason = metrics.adaptive_calibration_error(broken, target, per_class=per_class, return_reason=True)
            assert (reason[1] == Undefined.NAN_INPUT).all()
            assert value[1].isnan().all()
            assert not value[0].isnan().any()

    def test_every_reason_has_words(self):
        assert all(reason.text for reason in Undefined)
        assert Undefined(3).text == "nothing that counts is wrong"


DTYPES = {torch.float64: EXACT_METRIC, torch.float32: EXACT_METRIC, torch.bfloat16: 0.0, torch.float16: 0.0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_dtypes_and_layouts(dtype, layout):
    """A narrow map is scored as the float64 map of the same numbers; so is one with gaps in memory."""
    probability, target, uncertainty = segmentation(10, (2, 5, 6))
    args = [probability.to(dtype), target, uncertainty.to(dtype)]
    wide = [args[0].double(), target, args[2].double()]
    if layout == "strided":
        args = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in args]
    found, expected = (metrics.calibration_error_detection(*a) for a in (args, wide))
    for (name, a), (_, b) in zip(leaves(found), leaves(expected), strict=True):
        assert a.dtype == torch.float64, name
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
    error = args[0].argmax(1) != target
    for name, function in OF_ERRORS.items():
        options = {} if name == "uncertainty_error_overlap" else {"method": "exact"}
        torch.testing.assert_close(function(args[2], error, **options), function(wide[2], error, **options))
    gradient = torch.rand(2, 1, 5, 6)
    for function in (metrics.uncertainty_correlation, metrics.uncertainty_ratio):
        a, b = function(args[2], gradient), function(wide[2], gradient)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    maps = [args[2], args[2] * 1.5]
    a = metrics.noise_response(maps, [0.1, 0.2], distance=gradient)
    b = metrics.noise_response([m.double() for m in maps], [0.1, 0.2], distance=gradient)
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_nothing_needs_a_gradient():
    probability, target, uncertainty = segmentation(11)
    scores = metrics.calibration_error_detection(probability.requires_grad_(), target, uncertainty.requires_grad_())
    assert not any(t.requires_grad for _, t in leaves(scores))
    assert not metrics.error_detection_auroc(uncertainty, target > 0).value.requires_grad


def test_backends_agree():
    args = segmentation(12)
    with sk.backend("reference"):
        expected = metrics.calibration_error_detection(*args)
    for (name, a), (_, b) in zip(leaves(metrics.calibration_error_detection(*args)), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15, equal_nan=True, msg=name)


def test_case_mean_averages_what_is_defined():
    pooled = metrics.UncertaintyCorrelation()
    value, reason = pooled.compute(return_reason=True)
    assert math.isnan(value)
    assert int(reason) == Undefined.NO_VOXEL
    x, y = torch.rand(2, 3, 20)
    y[1] = 0.5
    pooled.update(x[:2], y[:2])
    pooled.update(x[2:], y[2:])
    expected = [metrics.uncertainty_correlation(x[i], y[i]).item() for i in (0, 2)]
    assert pooled.compute().item() == pytest.approx(sum(expected) / 2, abs=1e-12)
    ratio = metrics.UncertaintyRatio(relation="increasing", ties="official")
    ratio.update(x, y)
    expected = metrics.uncertainty_ratio(x, y, relation="increasing", ties="official").mean()
    assert ratio.compute().item() == pytest.approx(expected.item(), abs=1e-12)
    exact = metrics.CaseMean(metrics.error_detection_auroc, method="exact")
    exact.update(x, x < 0.5)
    assert exact.compute().item() == 0
