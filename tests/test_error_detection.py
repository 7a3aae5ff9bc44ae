"""AUROC, AUPRC and risk-coverage against scikit-learn and brute force; histograms within their bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from tolerances import EXACT_METRIC, GOLDEN_FLOAT64

from sure_kernels import metrics
from sure_kernels.ops.histograms import reference

FUNCTIONS = (metrics.error_detection_auroc, metrics.error_detection_auprc, metrics.area_under_risk_coverage)
STATES = (metrics.ErrorDetectionAUROC, metrics.ErrorDetectionAUPRC, metrics.AreaUnderRiskCoverage)


def risk_coverage(u: np.ndarray, error: np.ndarray) -> float:
    """Mean over coverages of the risk, with e errors among m tied voxels met at the rate e / m."""
    risks, errors, seen = [], 0.0, 0
    for value in np.unique(u):
        tied = error[u == value]
        for j in range(1, len(tied) + 1):
            risks.append((errors + tied.mean() * j) / (seen + j))
        errors, seen = errors + tied.sum(), seen + len(tied)
    return float(np.mean(risks))


EXPECTED = dict(
    zip(
        FUNCTIONS,
        (
            lambda u, e: roc_auc_score(e, u),
            lambda u, e: average_precision_score(e, u),
            risk_coverage,
        ),
        strict=True,
    )
)

MAPS = {
    "uniform": lambda g, n: g.random(n),
    "crowded near 0": lambda g, n: g.beta(0.3, 40, n),
    "crowded near 1": lambda g, n: 1 - g.beta(0.3, 40, n),
    "tiny": lambda g, n: 1e-6 * g.random(n),
    "two peaks": lambda g, n: np.where(g.random(n) < 0.9, g.beta(0.3, 40, n), g.beta(40, 2, n)),
    "ties": lambda g, n: np.round(g.random(n), 1),
    "constant": lambda g, n: np.full(n, 0.25),
    "beyond 0 and 1": lambda g, n: g.normal(0.5, 0.6, n),
}


def example(name: str, n: int = 4000, rate: float = 0.4, seed: int = 0, dtype=np.float32):
    """An uncertainty map and errors that it finds more often than not."""
    g = np.random.default_rng(seed)
    u = MAPS[name](g, n).astype(dtype)
    order = np.argsort(np.argsort(u)) / n
    error = g.random(n) < rate * order
    error[:2] = (True, False)
    return u, error


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("function", FUNCTIONS)
class TestValues:
    def test_exact(self, function, name):
        u, error = example(name)
        found = function(torch.from_numpy(u), torch.from_numpy(error), method="exact")
        assert found.item() == pytest.approx(EXPECTED[function](u, error), abs=EXACT_METRIC)

    @pytest.mark.parametrize("rate", [0.02, 0.4, 1.9])
    def test_histogram_is_within_its_bound(self, function, name, rate):
        u, error = example(name, rate=rate)
        value, bound = function(torch.from_numpy(u), torch.from_numpy(error), method="histogram")
        expected = EXPECTED[function](u, error)
        assert abs(value.item() - expected) <= bound.item() + 1e-12
        if name in ("uniform", "crowded near 0", "crowded near 1", "two peaks"):
            # The bins suit these: the bound is worth having, and the value much better than it.
            assert bound.item() < 0.05
            assert abs(value.item() - expected) < 0.004

    def test_bound_is_met_by_the_worst_order(self, function, name):
        """Voxels of one bin in any order: no order leaves the bound, so move them to the ends of their bins."""
        u, error = example(name, n=300)
        t = torch.from_numpy(u).double().clamp(0, 1)
        edges = torch.cat([reference.magnitude_edges(), reference.thresholds()]).sort().values
        bins = reference.fine_bin(t)
        low, high = edges[bins], edges[bins + 1]
        value, bound = function(t, torch.from_numpy(error), method="histogram")
        for up in (error, ~error):
            moved = low + (high - low) * torch.where(torch.from_numpy(up), 0.75, 0.25)
            same = reference.fine_bin(moved) == bins
            moved = torch.where(same, moved, t)
            exact = function(moved, torch.from_numpy(error), method="exact")
            assert abs(value - exact) <= bound + 1e-12


@pytest.mark.parametrize("function", FUNCTIONS)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40)
def test_exact_is_brute_force(function, n, levels, seed):
    """Pairs counted one by one (AUROC), thresholds one by one (AUPRC), orders of ties one by one (AURC)."""
    g = np.random.default_rng(seed)
    u, error = g.integers(levels, size=n) / 7, g.random(n) < 0.5
    found = function(torch.from_numpy(u), torch.from_numpy(error), method="exact").item()
    wrong, right = u[error], u[~error]
    if function is metrics.error_detection_auroc:
        pairs = [float(w > r) + 0.5 * float(w == r) for w in wrong for r in right]
        expected = np.mean(pairs) if pairs else np.nan
    elif function is metrics.error_detection_auprc:
        precision = [error[u >= w].mean() for w in wrong]
        expected = np.mean(precision) if len(wrong) else np.nan
    else:
        if n > 7:
            return
        orders = [p for p in itertools.permutations(range(n)) if all(u[i] <= u[j] for i, j in itertools.pairwise(p))]
        risks = [np.mean(np.cumsum(error[list(p)]) / np.arange(1, n + 1)) for p in orders]
        expected = np.mean(risks)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
class TestArguments:
    def test_shapes(self, function):
        g = torch.Generator().manual_seed(0)
        u = torch.rand((2, 1, 5, 6, 7), generator=g)
        error = torch.rand((2, 5, 6, 7), generator=g) < 0.3
        mask = torch.rand((2, 5, 6, 7), generator=g) < 0.8
        maps = function(u, error, mask=mask)
        assert isinstance(maps, metrics.Bounded)  # maps are volumes
        assert maps.value.shape == maps.bound.shape == (2,)
        exact = function(u, error, mask=mask, method="exact")
        assert exact.shape == (2,)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact, function(u, error[:, None].float(), mask=mask[:, None], method="exact"))
        rows = function(u.flatten(1), error.flatten(1), mask=mask.flatten(1))
        assert isinstance(rows, torch.Tensor)  # sets of points are sorted
        torch.testing.assert_close(rows, exact)
        one = function(u[0].flatten(), error[0].flatten(), mask=mask[0].flatten())
        assert one.ndim == 0
        torch.testing.assert_close(one, exact[0])
        torch.testing.assert_close(
            function(u.flatten(1), error.flatten(1), mask=mask.flatten(1), method="histogram"), maps
        )

    @pytest.mark.parametrize("method", ["exact", "histogram"])
    def test_kinds_of_error(self, function, method):
        """(N, C, *spatial) errors are C calls."""
        g = torch.Generator().manual_seed(1)
        u, error = torch.rand((2, 1, 6, 7), generator=g), torch.rand((2, 3, 6, 7), generator=g) < 0.3
        mask = torch.rand((2, 6, 7), generator=g) < 0.8
        found = function(u, error, mask=mask, method=method)
        each = [function(u, error[:, k], mask=mask, method=method) for k in range(3)]
        if method == "exact":
            found, each = (found,), [(t,) for t in each]
        for i, part in enumerate(found):
            assert part.shape == (2, 3)
            torch.testing.assert_close(part, torch.stack([t[i] for t in each], 1), rtol=0, atol=0)

    @pytest.mark.parametrize("method", ["exact", "histogram"])
    def test_masked_voxels_do_not_count(self, function, method):
        g = torch.Generator().manual_seed(2)
        u, error = torch.rand(50, generator=g), torch.rand(50, generator=g) < 0.4
        u[30:] = torch.nan
        mask = torch.arange(50) < 30
        torch.testing.assert_close(
            function(u, error, mask=mask, method=method), function(u[:30], error[:30], method=method)
        )

    def test_empty_sets(self, function):
        none = torch.zeros(0)
        value, reason = function(none, none.bool(), return_reason=True)
        assert value.isnan()
        assert int(reason) == metrics.Undefined.NO_VOXEL
        assert function(none, none.bool(), method="histogram").value.isnan()
        with pytest.raises(ValueError, match=r"uncertainty: expected at least one set of points, got \(0, 5\)"):
            function(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool))

    def test_errors(self, function):
        u, error = torch.rand(2, 6), torch.rand(2, 6) < 0.5
        with pytest.raises(TypeError, match="uncertainty: expected float32"):
            function(error, error)
        with pytest.raises(ValueError, match=r"error: expected shape \(2, 6\) like uncertainty, got \(2, 5\)"):
            function(u, error[:, :5])
        with pytest.raises(ValueError, match="error: expected only 0 and 1"):
            function(u, u)
        with pytest.raises(ValueError, match="mask: expected only 0 and 1"):
            function(u, error, mask=u)
        with pytest.raises(ValueError, match="method: expected one of exact, histogram, got 'fast'"):
            function(u, error, method="fast")
        with pytest.raises(ValueError, match=r"error: expected shape \(1, 3, 4, 5\) like uncertainty"):
            function(torch.rand(1, 1, 4, 5), torch.zeros(1, 3, 4, 6, dtype=torch.bool))


@pytest.mark.parametrize(("state", "function"), list(zip(STATES, FUNCTIONS, strict=True)))
class TestTwins:
    def test_pool_voxels(self, state, function):
        g = torch.Generator().manual_seed(3)
        u, error = torch.rand((3, 1, 6, 7), generator=g), torch.rand((3, 6, 7), generator=g) < 0.3
        pooled = state()
        assert torch.isnan(pooled.compute().value)
        for i in range(3):
            pooled.update(u[i : i + 1], error[i : i + 1])
        joined = function(u.flatten(), error.flatten(), method="histogram")
        torch.testing.assert_close(pooled.compute(), joined, rtol=1e-12, atol=0)
        pooled.reset()
        assert torch.isnan(pooled.compute().value)

    def test_kinds_of_error(self, state, function):
        g = torch.Generator().manual_seed(4)
        u, error = torch.rand((2, 1, 6, 7), generator=g), torch.rand((2, 3, 6, 7), generator=g) < 0.3
        pooled = state(num_classes=3)
        pooled.update(u, error)
        for k in range(3):
            expected = function(u.flatten(), error[:, k].flatten(), method="histogram")
            torch.testing.assert_close(pooled.compute().value[k], expected.value, rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match="error: expected 3 kinds of error, got 2"):
            pooled.update(u, error[:, :2])


def test_published_maps(golden):
    """Uncertainty of a published network's output, against scikit-learn."""
    stored = golden("10_calibration")
    u = stored["u"].flatten()
    error = stored["pred"].flatten() != stored["labels"].flatten()
    for function in FUNCTIONS:
        expected = EXPECTED[function](u.numpy(), error.numpy())
        assert function(u, error).item() == pytest.approx(expected, abs=GOLDEN_FLOAT64)
        value, bound = function(u, error, method="histogram")
        assert abs(value.item() - expected) <= bound.item() < 0.01
