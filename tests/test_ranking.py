"""Pairwise ranking: all pairs against brute force, its relaxations, and what must not change it."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FLOAT64_GRADIENT, FLOAT64_VALUE

import sure_kernels as sk
from sure_kernels.functional import RELATIONS
from sure_kernels.kernel_lib.ordering import order_bits
from sure_kernels.ops.ranking import closed_form
from sure_kernels.ops.ranking.reference import violations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(numbers=st.lists(st.floats(allow_nan=False), min_size=1, max_size=30))
def test_bits_order_as_numbers_do(dtype, numbers):
    """Infinities, both zeros and subnormal numbers too."""
    x = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    bits = order_bits(x)
    assert torch.equal(bits[:, None] < bits, x[:, None] < x)
    assert torch.equal(bits[:, None] == bits, x[:, None] == x)


def loss_and_gradient(function, values, *args, **options):
    leaf = values.detach().clone().requires_grad_()
    loss = function(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def points(shape, seed=0, levels=None, dtype=torch.float64):
    """Values and scores; with `levels` they are rounded to so many steps, for ties."""
    g = torch.Generator().manual_seed(seed)
    pair = [torch.rand(shape, generator=g, dtype=torch.float64) - 0.5 for _ in range(2)]
    if levels:
        pair = [(x * levels).round() / levels for x in pair]
    return [x.to(dtype) for x in pair]


def brute_force(values, scores, mask, groups, relation):
    """(value, count) of all images, by two nested loops written without looking at the reference."""
    rows, pairs = [], 0
    for i in range(len(values)):
        chosen = [j for j in range(values.shape[1]) if mask is None or bool(mask[i, j])]
        x, y = values[i].tolist(), scores[i].tolist()
        group = [0] * len(x) if groups is None else groups[i].tolist()
        total, count = 0.0, 0
        for a in chosen:
            for b in chosen:
                product = (x[a] - x[b]) * (y[a] - y[b])
                if a < b and group[a] == group[b] and (product > 0 if relation == "decreasing" else product < 0):
                    total, count = total + abs(product), count + 1
        rows.append(total / count if count else 0.0)
        pairs += count
    return sum(rows) / len(rows), pairs


class TestExact:
    @given(
        n=st.integers(1, 40),
        rows=st.integers(1, 3),
        levels=st.sampled_from([None, 2, 5]),
        masked=st.booleans(),
        grouped=st.booleans(),
        relation=st.sampled_from(RELATIONS),
        seed=st.integers(0, 2**20),
    )
    def test_is_brute_force(self, n, rows, levels, masked, grouped, relation, seed):
        values, scores = points((rows, n), seed, levels)
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand((rows, n), generator=g) < 0.6 if masked else None
        groups = torch.randint(-1, 3, (rows, n), generator=g) if grouped else None
        options = {"mask": mask, "groups": groups, "relation": relation}
        loss = sk.pairwise_ranking_loss(values, scores, **options)
        expected, count = brute_force(values, scores, mask, groups, relation)
        assert abs(float(loss) - expected) <= FLOAT64_VALUE
        sets = closed_form.sets_of(values, scores, mask, groups, relation)
        assert int(closed_form.violating_pairs(sets).number.sum()) == count

    @given(
        n=st.integers(2, 2000),
        levels=st.sampled_from([None, 3, 30, 300]),
        masked=st.booleans(),
        grouped=st.booleans(),
        relation=st.sampled_from(RELATIONS),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        seed=st.integers(0, 2**20),
    )
    def test_value_count_and_gradient(self, n, levels, masked, grouped, relation, dtype, seed):
        """Against the reference, which looks at every pair, with heavy ties."""
        values, scores = (x.double() for x in points((2, n), seed, levels, dtype))
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand((2, n), generator=g) < 0.6 if masked else None
        groups = torch.randint(0, 3, (2, n), generator=g).to(torch.uint8) if grouped else None
        options = {"mask": mask, "groups": groups, "relation": relation}
        loss, gradient = loss_and_gradient(sk.pairwise_ranking_loss, values, scores, **options)
        expected, expected_gradient = loss_and_gradient(sk.reference.pairwise_ranking_loss, values, scores, **options)
        assert abs(float(loss - expected)) <= FLOAT64_VALUE * max(1.0, float(expected))
        scale = max(float(expected_gradient.abs().max()), 1e-30)
        assert float((gradient - expected_gradient).abs().max()) <= FLOAT64_GRADIENT * scale
        sets = closed_form.sets_of(values, scores, mask, groups, relation)
        number = closed_form.violating_pairs(sets).number.tolist()
        starts = [0, *sets.sizes.cumsum(0).tolist()]
        for a, b, count in zip(starts, starts[1:], number, strict=False):
            assert count == int(violations(sets.value[a:b], sets.score[a:b], "decreasing")[1])

    def test_float32_points_keep_their_ties_and_their_order(self):
        """Neighbouring floats, huge and tiny ones, and both zeros."""
        x = torch.tensor([0.0, -0.0, 1.0, 1.0 + 2**-23, -1e30, 1e30, 1e-38, -1e-45, 1.0, 3.0])
        g = torch.Generator().manual_seed(3)
        y = x[torch.randperm(len(x), generator=g)]
        sets = closed_form.sets_of(x[None], y[None], None, None, "decreasing")
        product = torch.sign(x[:, None].double() - x) * torch.sign(y[:, None].double() - y)
        assert int(closed_form.violating_pairs(sets).number) == int((product > 0).sum()) // 2

    def test_runs_repeat_to_the_bit(self):
        values, scores = points((2, 3000), levels=500, dtype=torch.float32)
        first, second = (loss_and_gradient(sk.pairwise_ranking_loss, values, scores) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

    def test_the_order_of_points_does_not_matter(self):
        values, scores = points((1, 3000), levels=200)
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
        loss, gradient = loss_and_gradient(sk.pairwise_ranking_loss, values, scores)
        other, moved = loss_and_gradient(sk.pairwise_ranking_loss, values[:, order], scores[:, order])
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(moved, gradient[:, order], rtol=1e-9, atol=1e-15)

    def test_the_two_relations_mirror_each_other(self):
        values, scores = points((2, 300))
        increasing = sk.pairwise_ranking_loss(values, scores, relation="increasing")
        torch.testing.assert_close(increasing, sk.pairwise_ranking_loss(values, -scores))

    def test_points_that_violate_nothing_have_no_gradient(self):
        """Exactly none, whatever rounding leaves of the sums over the others."""
        values, scores = points((1, 400), seed=3)
        values[0, :200], scores[0, :200] = 2 + torch.arange(200) / 7, -1 - torch.arange(200) / 3
        _, gradient = loss_and_gradient(sk.pairwise_ranking_loss, values, scores)
        assert not gradient[0, :200].any()
        assert gradient[0, 200:].any()

    def test_offsets_change_nothing(self):
        """Sums of large values cancel."""
        values, scores = points((1, 2000))
        loss, gradient = loss_and_gradient(sk.pairwise_ranking_loss, values, scores)
        shifted, moved = loss_and_gradient(sk.pairwise_ranking_loss, values + 1024.0, scores - 4096.0)
        torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(moved, gradient, rtol=1e-8, atol=1e-14)

    @pytest.mark.parametrize("n", [100, 1000])
    def test_a_perfect_relation_costs_nothing(self, n):
        x = torch.linspace(0, 1, n)[None]
        loss, gradient = loss_and_gradient(sk.pairwise_ranking_loss, x, 1 - x)
        assert float(loss) == 0
        assert not gradient.any()

    @pytest.mark.parametrize("method", ["exact", "sampled", "covariance"])
    @pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
    def test_nothing_to_rank_is_zero(self, namespace, method):
        values, scores = points((3, 7))
        mask = torch.zeros((3, 7), dtype=torch.bool)
        mask[1, 3] = True
        tied = torch.zeros_like(values)
        ranking = functools.partial(loss_and_gradient, namespace.pairwise_ranking_loss, method=method)
        for options in ({"mask": mask}, {"groups": torch.arange(7).expand(3, 7)}):
            loss, gradient = ranking(values, scores, **options)
            assert float(loss) == 0
            assert not gradient.any()
        for x, y in ((tied, scores), (values, tied)):
            loss, gradient = ranking(x, y)
            assert float(loss) == 0
            assert method == "covariance" or not gradient.any()

    def test_an_image_without_a_pair_stays_in_the_mean(self):
        values, scores = points((2, 50))
        mask = torch.ones((2, 50), dtype=torch.bool)
        mask[1] = False
        half = sk.pairwise_ranking_loss(values, scores, mask=mask)
        torch.testing.assert_close(2 * half, sk.pairwise_ranking_loss(values[:1], scores[:1]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype):
        values, scores = points((2, 1, 9, 8), levels=64, dtype=dtype)
        loss, gradient = loss_and_gradient(sk.pairwise_ranking_loss, values, scores)
        expected, exact = loss_and_gradient(sk.reference.pairwise_ranking_loss, values.double(), scores)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert gradient.shape == values.shape
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=float(exact.abs().max()) * 2**-8)

    def test_scores_of_full_precision_count_in_full(self):
        values = torch.tensor([[1.0, 2.0]])
        scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
        assert float(sk.pairwise_ranking_loss(values, scores)) == pytest.approx(1e-12, rel=1e-3)

    def test_maps_are_sets_of_their_voxels(self):
        values, scores = points((2, 60))
        mask = torch.rand((2, 60), generator=torch.Generator().manual_seed(0)) < 0.5
        expected = sk.pairwise_ranking_loss(values, scores, mask=mask)
        shape = (2, 1, 3, 4, 5)
        for m in (mask.view(shape), mask.view(2, 3, 4, 5), mask.view(shape).float()):
            got = sk.pairwise_ranking_loss(values.view(shape), scores.view(shape), mask=m)
            assert torch.equal(got, expected)
        transposed = values.view(2, 1, 6, 10).transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(
            sk.pairwise_ranking_loss(transposed, scores.view(2, 1, 6, 10), mask=mask.view(2, 6, 10)), expected
        )

    def test_one_million_points_in_bounded_memory(self):
        """Against a sum over sorted blocks that needs no pairs: with x = y every pair violates."""
        x = torch.rand((1, 10**6), generator=torch.Generator().manual_seed(0))
        loss, gradient = loss_and_gradient(sk.pairwise_ranking_loss, x, x)
        n, values = x.shape[1], x.double()
        pairs = n * values.square().sum() - values.sum() ** 2
        tied = torch.unique(x, return_counts=True)[1]
        distinct = (n * (n - 1) - int((tied * (tied - 1)).sum())) // 2
        assert float(loss) == pytest.approx(float(pairs) / distinct, rel=1e-6)
        assert float(gradient.double().sum()) == pytest.approx(0, abs=1e-9)


class TestCovariance:
    @given(n=st.integers(1, 60), grouped=st.booleans(), relation=st.sampled_from(RELATIONS), seed=st.integers(0, 2**20))
    def test_is_the_reference(self, n, grouped, relation, seed):
        values, scores = points((3, n), seed, 20)
        g = torch.Generator().manual_seed(seed)
        groups = torch.randint(0, 3, (3, n), generator=g) if grouped else None
        options = {"groups": groups, "mask": torch.rand((3, n), generator=g) < 0.8, "relation": relation}
        results = [
            loss_and_gradient(f.pairwise_ranking_loss, values, scores, method="covariance", **options)
            for f in (sk, sk.reference)
        ]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    def test_is_numpy(self):
        values, scores = points((1, 500))
        scores = 0.3 * values + scores
        cov = torch.cov(torch.cat((values, scores)), correction=0)
        expected = cov[0, 1] / cov[1, 1].sqrt()
        torch.testing.assert_close(sk.pairwise_ranking_loss(values, scores, method="covariance"), expected)


class TestSampled:
    def test_tends_to_all_pairs(self):
        values, scores = points((2, 400))
        exact = sk.pairwise_ranking_loss(values, scores)
        g = torch.Generator().manual_seed(0)
        drawn = sk.pairwise_ranking_loss(values, scores, method="sampled", num_pairs=400_000, generator=g)
        # Products of uniform differences have a deviation of about their mean: 5 sigma of 2 x 200,000 violating pairs.
        assert abs(float(drawn / exact) - 1) < 5 / 400_000**0.5

    def test_is_seeded(self):
        values, scores = points((2, 1, 20, 20))
        groups = torch.randint(0, 2, (2, 20, 20))
        options = {"method": "sampled", "num_pairs": 500, "groups": groups}
        runs = [
            loss_and_gradient(
                sk.pairwise_ranking_loss, values, scores, generator=torch.Generator().manual_seed(seed), **options
            )
            for seed in (1, 1, 2)
        ]
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])
        assert not torch.equal(runs[0][0], runs[2][0])

    def test_groups_are_not_crossed(self):
        values, scores = points((1, 50))
        groups = (torch.arange(50) % 2)[None]
        loss, gradient = loss_and_gradient(
            sk.pairwise_ranking_loss, values, torch.where(groups == 0, 0.0, scores), method="sampled", groups=groups
        )
        assert float(loss) > 0
        assert not gradient[groups == 0].any()


class TestGradientUncertainty:
    def test_is_the_ranking_of_the_boundary(self):
        u, g = (x.view(2, 1, 6, 7, 5) for x in points((2, 210)))
        target = torch.zeros((2, 6, 7, 5), dtype=torch.long)
        target[:, 2:4, 2:5] = 1
        d = sk.boundary_distance(target)
        for limit in (0.0, 1.0, 2.5):
            got = sk.gradient_uncertainty_loss(u, g, d, max_distance=limit, groups=target)
            expected = sk.pairwise_ranking_loss(u, g, mask=d <= limit, groups=target)
            assert torch.equal(got, expected)
        mask = torch.rand(target.shape) < 0.5
        got = sk.gradient_uncertainty_loss(u, g[:, 0], d[:, 0], mask=mask)
        assert torch.equal(got, sk.pairwise_ranking_loss(u, g, mask=(d[:, 0] <= 1) & mask))

    def test_the_gradient_flows_to_the_uncertainty_alone(self):
        u, g = (x.view(1, 1, 10, 10).requires_grad_() for x in points((1, 100)))
        d = torch.zeros((1, 1, 10, 10), requires_grad=True)
        loss = sk.gradient_uncertainty_loss(u, g, d)
        grads = torch.autograd.grad(loss, (u, g, d), allow_unused=True)
        assert grads[0].any()
        assert grads[1] is None
        assert grads[2] is None
