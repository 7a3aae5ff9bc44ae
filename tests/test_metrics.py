"""Ranks, noise response, calibration and overlap against golden numbers, SciPy, scikit-learn, torchmetrics.

Error detection has `test_error_detection.py`, undefined cases and dtypes `test_metrics_edges.py`.
"""

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
from tolerances import EXACT_METRIC, GOLDEN_FLOAT32, GOLDEN_FLOAT64, GOLDEN_OFFICIAL

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


@pytest.mark.parametrize("index", [0, 1, 2])
def test_official_ranks_are_the_published(index, golden):
    stored = golden(f"06_ucc_ur_sure_{index}")
    rise, distance = (stored["u1"] - stored["u"])[:, None], stored["d"][:, None]
    mask = distance <= stored["threshold"]
    correlation = metrics.uncertainty_correlation(distance, rise, mask=mask, compat="official")
    torch.testing.assert_close(correlation, stored["d_corr_stable"], rtol=GOLDEN_FLOAT64, atol=0, equal_nan=True)
    ratio = metrics.uncertainty_ratio(distance, rise, mask=mask, compat="official")
    torch.testing.assert_close(ratio, stored["d_ratio"], rtol=GOLDEN_FLOAT32, atol=0, equal_nan=True)
    torch.testing.assert_close(
        ratio, metrics.uncertainty_ratio(distance, rise, mask=mask, ties="official"), rtol=0, atol=0, equal_nan=True
    )
    # On the voxels that the published program samples along the gradient.
    for row, sample in enumerate(stored["g_idx"].long().split(stored["g_n"].tolist())):
        edge = stored["d"][row] <= stored["g_threshold"]
        if len(sample) < 2:  # nothing to compare; the published program gives 0
            assert stored["g_ratio"][row] == 0
            continue
        g, u = stored["g"][row][edge], stored["u"][row][edge]
        order = g.argsort(stable=True)[sample]
        ratio = metrics.uncertainty_ratio(g[order], u[order], compat="official")
        torch.testing.assert_close(ratio, stored["g_ratio"][row], rtol=GOLDEN_FLOAT32, atol=0, equal_nan=True)


@pytest.mark.parametrize("index", [0, 1])
def test_official_ranks_within_classes_are_the_published(index, golden):
    """PriUS: ratios averaged over classes, pairs at the same distance whose uncertainties differ by less than 1e-4."""
    stored = golden(f"07_ucc_ur_prius_{index}")
    distance, classes = stored["d"][:, None], stored["labels"][:, None]
    mask = distance <= stored["threshold"]
    rows = stored["d_class_counts"]
    for name in ("u", "u2"):
        u = stored[name][:, None]
        for x, y in ((u, distance), (distance, u)):
            ratio = metrics.uncertainty_ratio(x, y, mask=mask, groups=classes, compat="official")
            expected = stored[f"d_3d_{name}_allpairs"][0]
            torch.testing.assert_close(ratio.mean(), expected, rtol=GOLDEN_FLOAT64, atol=0)
    u = stored["u"][:, None]
    plain = metrics.uncertainty_ratio(distance, u, mask=mask, groups=classes)
    for column, compat in ((0, "official"), (1, None)):
        correlation = metrics.uncertainty_correlation(distance, u, mask=mask, groups=classes, compat=compat)
        for n in range(len(u)):
            mine = (rows[:, 0] == n) & (rows[:, 2] > 1)
            expected = stored["d_class_corr"][mine, column].nanmean()
            torch.testing.assert_close(correlation[n], expected, rtol=GOLDEN_FLOAT64, atol=0)
            discordant, concordant = rows[mine, 4].sum(), rows[mine, 5].sum()
            assert plain[n].item() == (discordant / (discordant + concordant).double()).item()


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=40)
def test_official_ratio_within_groups_is_brute_force(n, levels, kinds, seed):
    g = np.random.default_rng(seed)
    x, y, group = g.integers(levels, size=n) / 2, g.integers(levels, size=n) / 2, g.integers(kinds, size=n)
    x, y = (v + g.choice([0, 4e-5, 2e-4], n) for v in (x, y))
    ratios = []
    for k in range(kinds):
        members = np.flatnonzero(group == k)
        pairs = list(itertools.combinations(members, 2))
        follow = [
            (x[i] - x[j]) * (y[i] - y[j]) < 0
            or (x[i] == x[j] and abs(y[i] - y[j]) < 1e-4)
            or (y[i] == y[j] and abs(x[i] - x[j]) < 1e-4)
            for i, j in pairs
        ]
        if pairs:
            ratios.append(np.mean(follow))
    found = metrics.uncertainty_ratio(
        torch.from_numpy(x), torch.from_numpy(y), groups=torch.from_numpy(group), compat="official"
    )
    assert found.item() == pytest.approx(np.mean(ratios) if ratios else np.nan, abs=1e-12, nan_ok=True)


def test_many_rows_and_groups_are_their_calls():
    g = torch.Generator().manual_seed(5)
    x, y = (torch.randint(6, (4, 90), generator=g).float() for _ in range(2))
    groups, mask = torch.randint(5, (4, 90), generator=g), torch.rand((4, 90), generator=g) < 0.6
    mask[2] = False
    for function in (metrics.uncertainty_correlation, metrics.uncertainty_ratio):
        found = function(x, y, mask=mask, groups=groups)
        for row in range(4):
            chosen = mask[row]
            alone = function(x[row][chosen], y[row][chosen], groups=groups[row][chosen])
            torch.testing.assert_close(found[row], alone, rtol=0, atol=0, equal_nan=True)


def test_ranks_do_not_depend_on_the_order_of_points():
    g = torch.Generator().manual_seed(6)
    x, y = (torch.randint(40, (500,), generator=g).float() for _ in range(2))
    order = torch.randperm(500, generator=g)
    for function in (metrics.uncertainty_correlation, metrics.uncertainty_ratio):
        assert torch.equal(function(x, y), function(x[order], y[order]))


def test_correlation_of_many_points_is_exact():
    g = torch.Generator().manual_seed(7)
    x, y = (torch.rand(50_000, generator=g) for _ in range(2))
    y = (y + 0.3 * x).mul(500).round()
    expected = stats.spearmanr(x.numpy(), y.numpy()).statistic
    assert metrics.uncertainty_correlation(x, y).item() == pytest.approx(expected, abs=EXACT_METRIC)
    tau = stats.kendalltau(x.numpy(), y.numpy(), variant="b").statistic
    # Tau-b from the ratio: tau = (C - D) / sqrt((pairs - tied in x) (pairs - tied in y)).
    ratio = metrics.uncertainty_ratio(x, y, relation="increasing").item()
    pairs = 50_000 * 49_999 / 2
    tied = [pairs - sum(n * (n - 1) / 2 for n in np.unique(v.numpy(), return_counts=True)[1].tolist()) for v in (x, y)]
    joint = np.unique(torch.stack([x, y]).numpy(), axis=1, return_counts=True)[1]
    untied = sum(tied) - pairs + sum(n * (n - 1) / 2 for n in joint.tolist())
    assert (2 * ratio - 1) * untied / math.sqrt(tied[0] * tied[1]) == pytest.approx(tau, abs=EXACT_METRIC)


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


# Noise


@pytest.mark.parametrize("index", [0, 1, 2])
def test_share_of_rising_voxels_is_the_published(index, golden):
    stored = golden(f"06_ucc_ur_sure_{index}")
    maps = [stored[name][:, None] for name in ("u1", "u2")]
    levels = stored["sigma"].tolist()
    options = {"distance": stored["d"], "near": float(stored["threshold"])}
    for order, name in ((slice(None), "ratio_sigma"), (slice(None, None, -1), "ratio_sigma_rev")):
        pooled = metrics.NoiseResponse(num_levels=2)
        pooled.update(maps, levels[order], **options)
        assert pooled.compute().share.item() == pytest.approx(stored[name], rel=GOLDEN_OFFICIAL)
        found = metrics.noise_response(maps, levels[order], **options)
        voxels = (stored["d"] <= stored["threshold"]).flatten(1).sum(1)
        rising = (found.share[:, 0].where(voxels > 0, 0) * voxels).sum()
        assert (rising / voxels.sum()).item() == pytest.approx(stored[name], rel=GOLDEN_OFFICIAL)


@pytest.mark.parametrize("tied", [False, True])
def test_correlation_with_noise_is_scipys(tied):
    g = torch.Generator().manual_seed(8)
    maps = [torch.rand((2, 1, 5, 6), generator=g) + 0.2 * level for level in range(4)]
    if tied:
        maps = [(3 * m).round() for m in maps]
    levels = [0.0, torch.tensor([0.3, 0.1]), torch.tensor([0.2, 0.5]), 0.7]
    distance, mask = 6 * torch.rand((2, 5, 6), generator=g), torch.rand((2, 5, 6), generator=g) < 0.9
    found = metrics.noise_response(maps, levels, distance=distance, near=3.0, mask=mask)
    assert found.share.shape == (2, 3)
    assert found.share.dtype == found.correlation.dtype == torch.float64
    near = (distance <= 3) & mask
    for n in range(2):
        u = np.stack([m[n, 0][near[n]].numpy() for m in maps])
        s = [level if isinstance(level, float) else float(level[n]) for level in levels]
        each = [stats.spearmanr(u[:, i], s).statistic for i in range(u.shape[1]) if np.ptp(u[:, i]) > 0]
        assert found.correlation[n].item() == pytest.approx(np.mean(each), abs=1e-12)
        follows = [np.mean((u[i + 1] - u[i]) * (s[i + 1] - s[i]) > 0) for i in range(3)]
        np.testing.assert_allclose(found.share[n], follows, atol=1e-12)
    rows = metrics.noise_response(
        [m.flatten(1) for m in maps], levels, distance=distance.flatten(1), near=3.0, mask=mask.flatten(1)
    )
    torch.testing.assert_close(rows, found, rtol=0, atol=0)
    one = metrics.noise_response(
        [m[0].flatten() for m in maps], [0.0, 0.3, 0.2, 0.7], distance=distance[0].flatten(), near=3.0,
        mask=mask[0].flatten(),
    )  # fmt: skip
    torch.testing.assert_close(one, metrics.Response(found.share[0], found.correlation[0]), rtol=0, atol=0)


def test_noise_response_pools_voxels():
    g = torch.Generator().manual_seed(9)
    maps = [torch.rand((3, 1, 4, 5), generator=g) for _ in range(3)]
    distance = 6 * torch.rand((3, 4, 5), generator=g)
    pooled = metrics.NoiseResponse(num_levels=3)
    for part in (slice(0, 1), slice(1, 3)):
        pooled.update([m[part] for m in maps], [0.1, 0.5, 0.9], distance=distance[part])
    joined = metrics.noise_response([m.flatten() for m in maps], [0.1, 0.5, 0.9], distance=distance.flatten())
    torch.testing.assert_close(pooled.compute(), joined, rtol=1e-12, atol=1e-12)


def test_noise_response_errors():
    u, distance = torch.rand(2, 6), torch.rand(2, 6)
    with pytest.raises(ValueError, match="maps, levels: expected two or more of each and equally many, got 1 and 1"):
        metrics.noise_response([u], [0.1], distance=distance)
    with pytest.raises(ValueError, match="maps, levels: expected two or more of each and equally many, got 2 and 3"):
        metrics.noise_response([u, u], [0.1, 0.2, 0.3], distance=distance)
    with pytest.raises(ValueError, match=r"maps\[1\]: expected shape \(2, 6\) like maps\[0\], got \(2, 5\)"):
        metrics.noise_response([u, u[:, :5]], [0.1, 0.2], distance=distance)
    with pytest.raises(ValueError, match=r"distance: expected shape \(2, 6\) like maps\[0\]"):
        metrics.noise_response([u, u], [0.1, 0.2], distance=distance[:1])
    with pytest.raises(ValueError, match=r"levels\[1\]: expected a number or shape \(2,\), got \(3,\)"):
        metrics.noise_response([u, u], [0.1, torch.rand(3)], distance=distance)
    with pytest.raises(TypeError, match=r"levels\[0\]: expected a number, got str"):
        metrics.noise_response([u, u], ["low", 0.2], distance=distance)


# Calibration


def maps_of(seed: int, shape=(2, 9, 10), k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Overconfident probabilities, float64, and labels."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((shape[0], k, *shape[1:]), generator=g, dtype=torch.float64)
    return (1.5 * logits).softmax(1), torch.distributions.Categorical(logits=logits.movedim(1, -1)).sample()


@pytest.mark.parametrize("num_bins", [7, 10, 15])
@pytest.mark.parametrize("shape", [(2, 9, 10), (1, 5, 6, 7)])
def test_ece_is_torchmetrics(num_bins, shape):
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    torch.manual_seed(0)
    probability, target = maps_of(0, shape)
    top = metrics.expected_calibration_error(probability, target, num_bins=num_bins)
    each = metrics.expected_calibration_error(probability, target, num_bins=num_bins, per_class=True)
    for n in range(shape[0]):
        table, labels = probability[n].flatten(1).T, target[n].flatten()
        expected = multiclass_calibration_error(table, labels, num_classes=4, n_bins=num_bins, norm="l1")
        assert top[n].item() == pytest.approx(expected.item(), abs=1e-6)
        for k in range(4):
            expected = binary_calibration_error(table[:, k], (labels == k).int(), n_bins=num_bins, norm="l1")
            assert each[n, k].item() == pytest.approx(expected.item(), abs=1e-6)


def test_likelihood_is_sklearns():
    from sklearn.metrics import log_loss

    torch.manual_seed(1)
    probability, target = maps_of(1)
    found = metrics.negative_log_likelihood(probability, target)
    each = metrics.negative_log_likelihood(probability, target, per_class=True)
    for n in range(2):
        table, labels = probability[n].flatten(1).T.numpy(), target[n].flatten().numpy()
        assert found[n].item() == pytest.approx(log_loss(labels, table, labels=range(4)), rel=1e-12)
        for k in range(4):
            expected = log_loss(labels[labels == k], table[labels == k], labels=range(4))
            assert each[n, k].item() == pytest.approx(expected, rel=1e-12)


def test_brier_score_of_classes_is_sklearns():
    from sklearn.metrics import brier_score_loss

    torch.manual_seed(2)
    probability, target = maps_of(2)
    each = metrics.brier_score(probability, target, per_class=True)
    torch.testing.assert_close(each.sum(1), metrics.brier_score(probability, target), rtol=1e-12, atol=0)
    for n, k in itertools.product(range(2), range(4)):
        expected = brier_score_loss((target[n] == k).flatten().numpy(), probability[n, k].flatten().numpy())
        assert each[n, k].item() == pytest.approx(expected, rel=1e-12)


def equal_mass(confidence: np.ndarray, hit: np.ndarray, num_bins: int) -> float:
    order = np.argsort(confidence, kind="stable")
    parts = zip(np.array_split(confidence[order], num_bins), np.array_split(hit[order], num_bins), strict=True)
    return float(np.mean([abs(c.mean() - h.mean()) for c, h in parts]))


@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
def test_adaptive_error_is_equal_mass(scale):
    """Against ranges of whole voxels, where they divide the voxels; the histogram within its bound."""
    torch.manual_seed(3)
    probability, target = maps_of(3, (2, 20, 30))
    probability = probability.pow(scale) / probability.pow(scale).sum(1, keepdim=True)
    for per_class in (False, True):
        found = metrics.adaptive_calibration_error(probability, target, per_class=per_class)
        value, bound = metrics.adaptive_calibration_error(probability, target, per_class=per_class, method="histogram")
        assert found.shape == value.shape == bound.shape == ((2, 4) if per_class else (2,))
        assert ((found - value).abs() <= bound + 1e-12).all()
        assert scale > 1 or (bound < 0.02).all()  # above, most voxels share the bin below 1
        for n in range(2):
            if not per_class:
                top = probability[n].flatten(1).max(0)
                hit = top.indices == target[n].flatten()
                expected = [equal_mass(top.values.numpy(), hit.numpy().astype(float), 10)]
            else:
                expected = [
                    equal_mass(
                        probability[n, k].flatten().numpy(), (target[n] == k).flatten().numpy().astype(float), 10
                    )
                    for k in range(4)
                ]
            np.testing.assert_allclose(found[n].reshape(-1), expected, atol=1e-12)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=40)
def test_adaptive_error_shares_ties_and_cuts(n, num_bins, levels, seed):
    """Every voxel split into num_bins equal parts, and the hits of a tie spread over it: whole parts, no cuts."""
    g = np.random.default_rng(seed)
    confidence = 0.5 + g.integers(levels, size=n) / (2 * levels)
    target = (g.random(n) < confidence).astype(np.int64)
    hit = target.astype(float)
    for value in np.unique(confidence):
        hit[confidence == value] = hit[confidence == value].mean()
    expected = equal_mass(np.repeat(confidence, num_bins), np.repeat(hit, num_bins), num_bins)
    p = torch.from_numpy(confidence)
    args = torch.stack([1 - p, p])[None, :, :, None], torch.from_numpy(target).reshape(1, -1, 1)
    found = metrics.adaptive_calibration_error(*args, num_bins=num_bins, per_class=True)[0, 1]
    assert found.item() == pytest.approx(expected, abs=1e-12)
    value, bound = metrics.adaptive_calibration_error(*args, num_bins=num_bins, per_class=True, method="histogram")
    assert abs(value[0, 1] - found) <= bound[0, 1] + 1e-12


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


@pytest.mark.parametrize("bad", [math.inf, -math.inf, 2.0, -1.0, math.nan])
@pytest.mark.parametrize("how", ["mask", "ignored"])
def test_probabilities_of_voxels_that_do_not_count_may_be_anything(bad, how):
    probability = torch.softmax(torch.randn(1, 3, 4, 4), 1)
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    left_out = torch.zeros(1, 4, 4, dtype=torch.bool)
    left_out[0, 1, 2] = True
    spoilt = torch.where(left_out.unsqueeze(1), bad, probability)
    kwargs = {"mask": ~left_out}
    if how == "ignored":
        target, kwargs = torch.where(left_out, -100, target), {}
    for function in (metrics.expected_calibration_error, metrics.brier_score, metrics.negative_log_likelihood):
        torch.testing.assert_close(function(spoilt, target, **kwargs), function(probability, target, **kwargs))


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
