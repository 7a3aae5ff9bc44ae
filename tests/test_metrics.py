"""Metrics against golden numbers, scipy, sklearn and brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sure_kernels import metrics

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def calibration() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "10_calibration.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def probability(calibration) -> torch.Tensor:
    """(1, K, M, 1): the golden table as one case."""
    return torch.from_numpy(calibration["prob"]).T[None, :, :, None]


@pytest.fixture(scope="module")
def labels(calibration) -> torch.Tensor:
    return torch.from_numpy(calibration["labels"]).reshape(1, -1, 1)


# Ranks


def ties(n: int, seed: int, levels: int) -> torch.Tensor:
    return torch.randint(levels, (2, n), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_correlation_is_scipys(levels):
    x, y = ties(500, 0, levels)
    expected = stats.spearmanr(x.numpy(), y.numpy()).statistic
    assert metrics.uncertainty_correlation(x, y).item() == pytest.approx(expected, abs=1e-12)


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_ratio_counts_every_pair(n, levels, seed):
    x, y = ties(n, seed, levels)
    signs = [float(torch.sign((x[i] - x[j]) * (y[i] - y[j]))) for i, j in itertools.combinations(range(n), 2)]
    both = sum(bool(x[i] == x[j] and y[i] == y[j]) for i, j in itertools.combinations(range(n), 2))
    less, more, pairs = signs.count(-1.0), signs.count(1.0), len(signs)

    def near(value: torch.Tensor, follow: int, among: int) -> bool:
        return math.isnan(value) if among == 0 else value.item() == follow / among

    assert near(metrics.uncertainty_ratio(x, y), less, less + more)
    assert near(metrics.uncertainty_ratio(x, y, relation="increasing"), more, less + more)
    assert near(metrics.uncertainty_ratio(x, y, ties="official"), less + both, pairs)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_ranks_agree_with_golden(index):
    # an image without region or without pairs is 0/0 in the golden counts and NaN in the results
    with np.load(GOLDEN / f"06_ucc_ur_sure_{index}.npz") as stored, np.errstate(invalid="ignore"):
        rise = torch.from_numpy(stored["u1"] - stored["u"])[:, None]
        distance = torch.from_numpy(stored["d"])[:, None]
        mask = distance <= float(stored["threshold"])
        correlation = metrics.uncertainty_correlation(distance, rise.double(), mask=mask)
        np.testing.assert_allclose(correlation, stored["d_corr_avg"], rtol=1e-9)
        official = metrics.uncertainty_ratio(distance, rise.double(), ties="official", mask=mask)
        np.testing.assert_allclose(official, stored["d_ratio"], rtol=1e-6)
        ours = metrics.uncertainty_ratio(distance, rise.double(), mask=mask)
        _, discordant, concordant, *_ = stored["d_counts"].T
        np.testing.assert_allclose(ours, discordant / (discordant + concordant), rtol=1e-12)

        edge = distance <= float(stored["g_threshold"])
        gradient, u = (torch.from_numpy(stored[name]).double()[:, None] for name in ("g", "u"))
        np.testing.assert_allclose(
            metrics.uncertainty_correlation(gradient, u, mask=edge), stored["g_corr_all_avg"], rtol=1e-9
        )
        _, discordant, concordant, *_ = stored["g_counts_all"].T
        np.testing.assert_allclose(
            metrics.uncertainty_ratio(gradient, u, mask=edge),
            discordant / (discordant + concordant),
            rtol=1e-12,
        )


def test_correlation_within_groups_is_their_mean():
    x, y = ties(60, 3, 9)
    groups = torch.arange(60) % 3
    expected = np.mean([stats.spearmanr(x[groups == g], y[groups == g]).statistic for g in range(3)])
    result = metrics.uncertainty_correlation(x, y, groups=groups)
    assert result.item() == pytest.approx(expected, abs=1e-12)


def test_ratio_pools_pairs_of_groups():
    x, y = torch.tensor([[0.0, 1, 2, 10, 11], [2.0, 1, 0, 0, 1]])
    groups = torch.tensor([1, 1, 1, 2, 2])
    assert metrics.uncertainty_ratio(x, y, groups=groups).item() == 3 / 4


@pytest.mark.parametrize("function", [metrics.uncertainty_correlation, metrics.uncertainty_ratio])
class TestSets:
    def test_shapes(self, function):
        x, y = torch.rand(2, 2, 1, 4, 5, 3)
        mask = torch.rand(2, 4, 5, 3) < 0.7
        result = function(x, y, mask=mask)
        assert result.shape == (2,)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, function(x, y, mask=mask[:, None].float()))
        torch.testing.assert_close(result, function(x.flatten(1), y.flatten(1), mask=mask.flatten(1)))
        one = function(x[0].flatten(), y[0].flatten(), mask=mask[0].flatten())
        assert one.ndim == 0
        torch.testing.assert_close(one, result[0])

    def test_masked_points_do_not_count(self, function):
        x, y = torch.rand(2, 30)
        mask = torch.arange(30) < 20
        y[~mask] = torch.nan
        torch.testing.assert_close(function(x, y, mask=mask), function(x[:20], y[:20]))

    @pytest.mark.parametrize(
        ("x", "y"),
        [
            ([], []),
            ([1.0], [2.0]),
            ([1.0, 1, 1], [1.0, 2, 3]),
            ([1.0, 2], [3.0, 3]),
            ([1, torch.nan], [1, 2.0]),
        ],
    )
    def test_undefined_is_nan(self, function, x, y):
        assert torch.isnan(function(torch.tensor(x), torch.tensor(y)))

    def test_negative_zero_is_zero(self, function):
        assert torch.isnan(function(torch.tensor([0.0, -0.0]), torch.tensor([1.0, 2.0])))

    def test_all_masked_with_groups_is_nan(self, function):
        x, y = torch.rand(2, 4)
        none = torch.zeros(4, dtype=torch.bool)
        assert torch.isnan(function(x, y, mask=none, groups=torch.ones(4, dtype=torch.uint8)))

    def test_errors(self, function):
        x = torch.rand(2, 6)
        with pytest.raises(TypeError, match="x: expected float32"):
            function(x.long(), x)
        with pytest.raises(ValueError, match=r"y: expected shape \(2, 6\) like x, got \(2, 5\)"):
            function(x, x[:, :5])
        with pytest.raises(ValueError, match="mask: expected only 0 and 1"):
            function(x, x, mask=x)
        with pytest.raises(TypeError, match="groups: expected an integer dtype"):
            function(x, x, groups=x)
        with pytest.raises(ValueError, match=r"x: expected shape \(n,\), \(N, n\) or \(N, 1, \*spatial\)"):
            function(x.reshape(1, 2, 3, 2), x)


def test_half_precision_ranks_are_exact():
    x, y = torch.rand(2, 200).half()
    expected = stats.spearmanr(x.numpy(), y.numpy()).statistic
    assert metrics.uncertainty_correlation(x, y).item() == pytest.approx(expected, abs=1e-12)


# Calibration


def test_ece_per_class_is_the_official(calibration, probability, labels):
    result = metrics.expected_calibration_error(probability, labels, per_class=True)
    np.testing.assert_allclose(result[0], calibration["ece_all"], rtol=2e-5)


def test_reliability_bins_are_the_official(calibration, probability, labels):
    curve = metrics.reliability_curve(probability, labels, per_class=True)
    filled = torch.from_numpy(calibration["class1_bins_non_zero"])
    np.testing.assert_array_equal(curve.voxels[0, 1, filled], calibration["class1_bins_count"])
    np.testing.assert_allclose(curve.confidence[0, 1, filled], calibration["class1_bins_avg_confidence"], 1e-6)
    np.testing.assert_allclose(curve.accuracy[0, 1, filled], calibration["class1_bins_positive_fraction"], 1e-12)
    assert torch.isnan(curve.accuracy[0, 1, ~filled]).all()


def test_values_on_bin_edges(calibration):
    p = torch.from_numpy(calibration["edge_prob"])
    probability = torch.stack([1 - p, p])[None, :, :, None]
    target = torch.from_numpy(calibration["edge_target"]).long().reshape(1, -1, 1)
    curve = metrics.reliability_curve(probability, target, per_class=True)
    count = curve.voxels[0, 1]
    np.testing.assert_array_equal(count[count > 0], calibration["edge_bins_count"])
    ece = metrics.expected_calibration_error(probability, target, per_class=True)[0, 1]
    assert ece.item() == pytest.approx(float(calibration["edge_ece"]), rel=1e-6)


def test_top_label_ece_is_the_textbooks(probability, labels):
    top = probability.max(1)
    hit = top.indices == labels
    edges = np.linspace(0, 1, 11)
    confidence, expected = top.values.numpy().ravel(), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            gap = confidence[inside].mean(dtype=np.float64) - hit.numpy().ravel()[inside].mean()
            expected += inside.mean() * abs(gap)
    result = metrics.expected_calibration_error(probability, labels)
    assert result.item() == pytest.approx(expected, abs=1e-9)


def test_brier_is_sklearns(probability, labels):
    from sklearn.metrics import brier_score_loss

    table = probability[0, :, :, 0].T.double()
    table = table / table.sum(1, keepdim=True)
    expected = brier_score_loss(labels.numpy().ravel(), table.numpy(), labels=[0, 1, 2, 3], scale_by_half=False)
    result = metrics.brier_score(table.T[None, :, :, None], labels)
    assert result.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spatial", [(6, 7), (4, 5, 6)])
def test_calibration_ignores_what_does_not_count(spatial):
    probability = torch.softmax(torch.randn(2, 3, *spatial), 1)
    target = torch.randint(3, (2, *spatial))
    mask = torch.rand(2, *spatial) < 0.5
    ignored = torch.where(mask, target, 255)
    for function in (metrics.expected_calibration_error, metrics.brier_score):
        masked = function(probability, target, mask=mask)
        torch.testing.assert_close(masked, function(probability, ignored, ignore_index=255))
        row = mask[1]
        alone = function(probability[1:, :, row][..., None], target[1:, row][..., None])
        torch.testing.assert_close(masked[1:], alone)
        assert torch.isnan(function(probability, target, mask=torch.zeros_like(mask))).all()


def test_calibration_errors():
    probability = torch.softmax(torch.randn(1, 3, 4, 4), 1)
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="probability: expected values in"):
        metrics.brier_score(probability * 5, target)
    with pytest.raises(ValueError, match="target: expected labels in"):
        metrics.brier_score(probability, target + 3)
    with pytest.raises(ValueError, match="num_bins: expected at least 1"):
        metrics.reliability_curve(probability, target, num_bins=0)
    with pytest.raises(ValueError, match="probability: expected 2 classes, got 3"):
        metrics.ReliabilityCurve(num_classes=2).update(probability, target)


# Overlap


def test_ueo_is_the_official(calibration, labels):
    u = torch.from_numpy(calibration["u"]).reshape(1, -1)
    prediction = torch.from_numpy(calibration["prob"]).argmax(1)[None]
    target = labels.reshape(1, -1)
    for c, expected in enumerate(calibration["ueo"], 1):
        error = (prediction == c) ^ (target == c)
        assert metrics.uncertainty_error_overlap(u, error).item() == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 60), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_ueo_is_brute_force(n, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(101, (n,), generator=generator).double() / 100  # on the thresholds
    error = torch.rand(n, generator=generator) < 0.4
    mask = torch.rand(n, generator=generator) < 0.8
    result = metrics.uncertainty_error_overlap(u, error, mask=mask).item()
    wrong = error & mask
    if not wrong.any():
        assert math.isnan(result)
        return
    dice = [
        2 * int((wrong & (u > i / 100)).sum()) / (int(wrong.sum()) + int((mask & (u > i / 100)).sum()))
        for i in range(1, 100)
    ]
    assert result == pytest.approx(max(dice), abs=1e-12)


def test_ueo_with_nan_is_nan():
    u = torch.tensor([0.1, torch.nan, 0.3])
    error = torch.tensor([True, False, False])
    assert torch.isnan(metrics.uncertainty_error_overlap(u, error))
    counted = metrics.uncertainty_error_overlap(u, error, mask=torch.tensor([True, False, True]))
    assert counted.item() == pytest.approx(2 / 3)


# Stateful twins


def test_twins_pool_batches():
    probability = torch.softmax(torch.randn(3, 4, 5, 6), 1)
    target = torch.randint(4, (3, 5, 6))
    error = probability.argmax(1) != target
    u = torch.rand(3, 1, 5, 6)
    ece, each = metrics.ExpectedCalibrationError(), metrics.ExpectedCalibrationError(num_classes=4)
    brier, ueo, curve = metrics.BrierScore(), metrics.UncertaintyErrorOverlap(), metrics.ReliabilityCurve()
    assert torch.isnan(ece.compute())
    for i in range(3):
        part = slice(i, i + 1)
        for state in (ece, each, brier, curve):
            state.update(probability[part], target[part])
        ueo.update(u[part], error[part])
    joined = probability.transpose(0, 1).reshape(1, 4, 15, 6), target.reshape(1, 15, 6)
    torch.testing.assert_close(ece.compute(), metrics.expected_calibration_error(*joined)[0])
    torch.testing.assert_close(each.compute(), metrics.expected_calibration_error(*joined, per_class=True)[0])
    torch.testing.assert_close(brier.compute(), metrics.brier_score(*joined)[0])
    torch.testing.assert_close(ueo.compute(), metrics.uncertainty_error_overlap(u.reshape(-1), error.reshape(-1)))
    torch.testing.assert_close(curve.compute().voxels, metrics.reliability_curve(*joined).voxels[0])
    ece.reset()
    assert torch.isnan(ece.compute())
