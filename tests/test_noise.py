"""The noise losses, hard and soft, and the noise they are about."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOAT32_GRADIENT, FLOAT32_VALUE, FLOAT64_GRADIENT, FLOAT64_VALUE

import sure_kernels as sk
from sure_kernels.ops.noise import closed_form
from sure_kernels.ops.noise import op as noise_op
from sure_kernels.ops.noise_patches import closed_form as patches
from sure_kernels.ops.noise_patches import op as patches_op
from sure_kernels.ops.noise_patches import reference as patches_reference
from sure_kernels.ops.soft import op as soft_op

SOFT = sk.SoftThresholds(d_g=1.0, d_f=5.0, d_n=3.0, d_eps=1.0, alpha=2.0, coef_d=0.5, coef_far=3.0)


def setting(shape=(2, 1, 7, 6), levels=2, seed=0, dtype=torch.float64, ties=False):
    """Maps u_0 ... u_L, levels of which some differ from image to image, distance, labels and mask."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(levels + 1)]
    if ties:
        maps = [(4 * u).round() / 4 for u in maps]
    rising = torch.rand((levels, shape[0]), generator=g, dtype=torch.float64)
    m = [rising[i] if i % 2 else float(rising[i, 0]) for i in range(levels)]
    distance = 8 * torch.rand(shape, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.8
    return [u.to(dtype) for u in maps], m, distance, labels, mask


def points_in(shape, number, seed=0):
    """(N, number, ndim): some are none, some occur twice."""
    g = torch.Generator().manual_seed(seed)
    points = torch.stack([torch.randint(0, s, (shape[0], number), generator=g) for s in shape[2:]], -1)
    points[torch.rand(points.shape[:2], generator=g) < 0.2] = -1
    points[:, -1] = points[:, 0]
    return points


def evaluate(namespace, maps, *args, function="noise_uncertainty_loss", **options):
    """(loss, terms, gradients of every map)."""
    leaves = [u.detach().clone().requires_grad_() for u in maps]
    loss, terms = getattr(namespace, function)(leaves[0], leaves[1:], *args, return_terms=True, **options)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), terms, [torch.zeros_like(u) if g is None else g for u, g in zip(maps, gradients, strict=True)]


def assert_same(got, expected, value=FLOAT64_VALUE, gradient=FLOAT64_GRADIENT):
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=value, atol=value)
    torch.testing.assert_close(torch.stack(got[1]).double(), torch.stack(expected[1]).double(), rtol=value, atol=value)
    for a, b in zip(got[2], expected[2], strict=True):
        assert float((a.double() - b.double()).abs().max()) <= gradient * max(1e-30, float(b.abs().max()))


def mean_positive(numbers):
    positive = [x for x in numbers if x > 0]
    return sum(positive) / len(positive) if positive else 0.0


def brute_force(maps, levels, distance, mask, labels, points, near):
    """(L_mu, L_d, L_far) by loops over Python numbers, written without looking at the reference."""
    n, spatial = len(maps[0]), maps[0].shape[2:]
    m = [[0.0] * n, *([float(x)] * n if isinstance(x, float) else x.tolist() for x in levels)]
    u = [x.squeeze(1) for x in maps]
    voxels = list(itertools.product(*(range(s) for s in spatial)))
    falls = {pair: [] for pair in itertools.combinations(range(len(u)), 2) if pair[0] in (0, pair[1] - 1)}
    far, rankings = [], 0.0
    for i in range(n):
        counted = [v for v in voxels if bool(mask[i, 0][v])]
        chosen = counted
        if points is not None:
            chosen = [v for v in map(tuple, points[i].tolist()) if v[0] >= 0 and bool(mask[i, 0][v])]
        close = [v for v in chosen if float(distance[i, 0][v]) <= near]
        far += [sum(float(x[i][v]) for x in u) for v in counted if float(distance[i, 0][v]) > near]
        for k, j in falls:
            falls[k, j] += [-(float(u[j][i][v]) - float(u[k][i][v])) * (m[j][i] - m[k][i]) for v in close]
        for x in u[1:]:
            rise = [(float(x[i][v] - u[0][i][v]), float(distance[i, 0][v]), int(labels[i, 0][v])) for v in close]
            products = [(a - b) * (d - e) for (a, d, y), (b, e, z) in itertools.combinations(rise, 2) if y == z]
            rankings += mean_positive(products) / n
    mu = sum(mean_positive(x) for x in falls.values())
    return mu, rankings, sum(far) / len(far) if far else 0.0


class TestHard:
    @pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
    @pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 1, 3, 2, 4)])
    @pytest.mark.parametrize("levels", [1, 2, 4])
    @pytest.mark.parametrize("pointwise", [False, True])
    def test_brute_force(self, namespace, shape, levels, pointwise):
        maps, m, distance, labels, mask = setting(shape, levels)
        points = points_in(shape, 40) if pointwise else None
        expected = brute_force(maps, m, distance, mask, labels, points, 4.0)
        loss, terms = namespace.noise_uncertainty_loss(
            maps[0], maps[1:], m, distance,
            points=points, mask=mask, groups=labels, weights=(2.0, 3.0, 5.0), return_terms=True,
        )  # fmt: skip
        assert all(float(x) > 0 for x in terms)
        assert torch.stack(terms).tolist() == pytest.approx(expected, rel=1e-12)
        assert float(loss) == pytest.approx(sum(w * x for w, x in zip((2, 3, 5), expected, strict=True)), rel=1e-12)

    @given(
        shape=st.sampled_from([(1, 1, 1, 1), (3, 1, 5, 2), (2, 1, 7, 6), (2, 1, 3, 4, 5), (1, 1, 2, 1, 3)]),
        levels=st.integers(1, 4),
        masked=st.booleans(),
        grouped=st.booleans(),
        pointwise=st.booleans(),
        official=st.booleans(),
        ties=st.booleans(),
        near=st.sampled_from([0.0, 2.0, 4.0, 100.0]),
        weights=st.sampled_from([(1.0, 1.0, 1.0), (2.0, 0.0, 0.5), (0.0, 3.0, 0.0)]),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=30)
    def test_closed_form(self, shape, levels, masked, grouped, pointwise, official, ties, near, weights, seed):
        maps, m, distance, labels, mask = setting(shape, levels, seed, ties=ties)
        options = {
            "points": points_in(shape, 5, seed) if pointwise else None,
            "mask": mask if masked else None,
            "groups": labels if grouped else None,
            "near": near,
            "weights": weights,
            "compat": "official" if official else None,
        }
        expected = evaluate(sk.reference, maps, m, distance, **options)
        assert_same(evaluate(sk, maps, m, distance, **options), expected)

    @pytest.mark.parametrize("pointwise", [False, True])
    def test_float32_and_half(self, pointwise):
        maps, m, distance, _, mask = setting((2, 1, 16, 16))
        options = {"mask": mask, "points": points_in((2, 1, 16, 16), 40) if pointwise else None}
        for dtype, tolerance in ((torch.float32, FLOAT32_GRADIENT), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
            low = [u.to(dtype) for u in maps]
            expected = evaluate(sk.reference, [u.double() for u in low], m, distance.float(), **options)
            got = evaluate(sk, low, m, distance.float(), **options)
            assert got[0].dtype == got[1].mu.dtype == torch.float32
            assert all(g.dtype == dtype for g in got[2])
            assert_same(got, expected, FLOAT32_VALUE, tolerance)

    def test_pieces_join(self, monkeypatch):
        """However many voxels and images are taken at a time."""
        from sure_kernels.kernel_lib import chunks

        maps, m, distance, _, mask = setting((5, 1, 7, 6))
        expected = evaluate(sk, maps, m, distance, mask=mask)
        for budget in (1, 50, 300):
            monkeypatch.setattr(chunks, "CPU_ELEMENTS", budget)
            assert_same(evaluate(sk, maps, m, distance, mask=mask), expected)

    def test_layouts(self):
        maps, m, distance, _, mask = setting((2, 1, 4, 5, 6))
        expected = evaluate(sk, maps, m, distance, mask=mask)
        moved = [u.transpose(2, 4).contiguous().transpose(2, 4) for u in (*maps, distance, mask)]
        assert not moved[0].is_contiguous()
        assert_same(evaluate(sk, moved[:3], m, moved[3], mask=moved[4]), expected)
        one = [u[:1].expand_as(u) for u in maps]
        assert_same(evaluate(sk, one, m, distance), evaluate(sk, [u.contiguous() for u in one], m, distance))

    def test_ways_to_say_the_same(self):
        maps, _, distance, labels, mask = setting((2, 1, 4, 5))
        clean, *noisy = maps
        expected = sk.noise_uncertainty_loss(clean, noisy, (0.3, 0.7), distance, mask=mask, groups=labels)
        for levels in (
            [0.3, 0.7],
            torch.tensor([0.3, 0.7], dtype=torch.float64),
            (torch.tensor(0.3, dtype=torch.float64), 0.7),
            torch.tensor([[0.3, 0.3], [0.7, 0.7]], dtype=torch.float64),
        ):
            got = sk.noise_uncertainty_loss(
                clean,
                torch.stack(noisy),
                levels,
                distance[:, 0],
                mask=mask[:, 0].int(),
                groups=labels[:, 0].to(torch.uint8),
            )
            assert torch.equal(got, expected)
        everywhere = torch.cartesian_prod(torch.arange(4), torch.arange(5)).expand(2, -1, -1)
        got = sk.noise_uncertainty_loss(
            clean, noisy, (0.3, 0.7), distance, mask=mask, groups=labels, points=everywhere.int()
        )
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
    def test_where_gradients_flow(self, namespace):
        maps, m, distance, _, _ = setting()
        for weights, reached in (((1, 1, 0), False), ((0, 0, 1), True)):
            _, _, gradients = evaluate(namespace, maps, m, distance, weights=weights)
            assert bool((gradients[0] != 0).any()) is reached
            assert all(bool((g != 0).any()) for g in gradients[1:])
        for weights in ((1, 0, 0), (0, 1, 0)):
            _, _, gradients = evaluate(namespace, maps, m, distance, weights=weights, compat="official")
            # Every term is of differences: what the maps get adds up to nothing.
            torch.testing.assert_close(gradients[0], -sum(gradients[1:]))
            assert bool((gradients[0] != 0).any())

    @pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
    def test_thresholds_and_infinity(self, namespace):
        maps, m, distance, _, _ = setting((1, 1, 2, 3), 1)
        distance = torch.tensor([[4.0, 4.0 + 1e-12, math.inf], [math.nan, 0.0, 5.0]], dtype=torch.float64).view(
            1, 1, 2, 3
        )
        u0, u1 = (u.flatten().tolist() for u in maps)
        _, terms = namespace.noise_uncertainty_loss(maps[0], maps[1:], m, distance, return_terms=True)
        falls = [(u0[i] - u1[i]) * m[0] for i in (0, 4)]
        assert float(terms.mu) == pytest.approx(mean_positive(falls))
        assert float(terms.far) == pytest.approx(sum(u0[i] + u1[i] for i in (1, 2, 5)) / 3)
        # As published, infinitely far points would be differences of 0 at no finite distance: they stay out.
        _, official = namespace.noise_uncertainty_loss(
            maps[0], maps[1:], m, distance, return_terms=True, compat="official"
        )
        assert math.isfinite(float(official.d))

    @pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
    def test_nothing_to_say_is_zero(self, namespace):
        maps, m, distance, _, mask = setting()
        nan = [torch.full_like(u, math.nan) for u in maps]
        for u, d, options in (
            (maps, torch.zeros_like(distance), {"weights": (0, 0, 1)}),
            (maps, torch.full_like(distance, math.inf), {"weights": (1, 1, 0)}),
            (nan, distance, {"mask": torch.zeros_like(mask)}),
            (maps, distance, {"points": torch.full((2, 3, 2), -1), "weights": (1, 1, 0)}),
            ([maps[0]] * 3, distance, {"weights": (1, 1, 0)}),
        ):
            loss, _, gradients = evaluate(namespace, u, m, d, **options)
            assert float(loss) == 0
            assert all(bool((g == 0).all()) for g in gradients)

    @pytest.mark.parametrize("namespace", [sk, sk.reference], ids=["eager", "reference"])
    def test_voxels_that_do_not_count(self, namespace):
        maps, m, distance, labels, mask = setting()
        expected = evaluate(namespace, maps, m, distance, mask=mask, groups=labels)
        dirty = [torch.where(mask, u, math.nan) for u in maps]
        got = evaluate(namespace, dirty, m, torch.where(mask, distance, math.nan), mask=mask, groups=labels)
        assert_same(got, expected)
        assert all(bool((g[~mask] == 0).all()) for g in got[2])

    def test_it_is_the_same_whichever_way_round(self):
        maps, _, distance, _, _ = setting((4, 1, 5, 6))
        levels = torch.rand((2, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = evaluate(sk, maps, levels, distance)
        order = torch.tensor([2, 0, 3, 1])
        got = evaluate(sk, [u[order].flip(2) for u in maps], levels[:, order], distance[order].flip(2))
        back = order.argsort()
        assert_same((got[0], got[1], [g.flip(2)[back] for g in got[2]]), expected)
        points = points_in((4, 1, 5, 6), 8)
        mixed = points[:, torch.randperm(8, generator=torch.Generator().manual_seed(2))]
        assert_same(
            evaluate(sk, maps, levels, distance, points=mixed), evaluate(sk, maps, levels, distance, points=points)
        )

    def test_descent_teaches_the_network_about_noise(self):
        """Uncertainty rises with noise near the boundary, less so farther from it, and vanishes far away."""
        maps, _, _, _, _ = setting((1, 1, 12, 12))
        distance = torch.arange(12.0, dtype=torch.float64).expand(1, 1, 12, 12)
        raw = [torch.logit(u.clamp(0.05, 0.95)).requires_grad_() for u in maps]
        optimizer = torch.optim.Adam(raw, 0.05)
        before = None
        for _ in range(150):
            u = [x.sigmoid() for x in raw]
            loss, terms = sk.noise_uncertainty_loss(
                u[0], u[1:], (0.2, 0.9), distance, weights=(5, 1, 1), return_terms=True
            )
            before = before or terms
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        near = distance <= 4
        assert float(terms.mu) < 0.05 * float(before.mu)
        assert float(terms.d) < 0.2 * float(before.d)
        assert float(terms.far) < 0.1 * float(before.far)
        falls = [(a - b)[near].detach() for a, b in itertools.pairwise(u)]
        assert max(float(fall.max()) for fall in falls) < 0.1
        assert max(float((fall > 0.01).double().mean()) for fall in falls) < 0.15

    def test_a_nan_is_named(self):
        maps, m, distance, _, _ = setting()
        bad = [u.clone() for u in maps]
        bad[2][1, 0, 3, 2] = math.nan
        with pytest.raises(ValueError, match=r"noisy\[1\]: expected finite values.*\(1, 3, 2\)"):
            sk.noise_uncertainty_loss(bad[0], bad[1:], m, distance)
        with pytest.raises(ValueError, match=r"clean: expected finite values"):
            sk.noise_uncertainty_loss(bad[2], bad[:2], m, distance)

    def test_custom_ops_are_well_formed(self):
        maps, m, distance, _, mask = setting()
        rows = [u.flatten(1) for u in (*maps, distance, mask)]
        levels = torch.stack([torch.zeros(2).double(), *(torch.as_tensor(x).double().expand(2) for x in m)])
        given = (rows[:3], levels, rows[3], rows[4])
        torch.library.opcheck(noise_op.noise_sums.op, (*given, 4.0, True, True, "eager"))
        coefficients, up = torch.rand(4, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for clean in (False, True):
            options = (*given, coefficients, up, 4.0, True, True, clean, clean, "eager")
            torch.library.opcheck(noise_op.noise_gradient.op, options)

    def test_full_graph(self):
        maps, m, distance, labels, mask = setting()
        points, pairs = points_in((2, 1, 7, 6), 5), torch.arange(84).view(-1, 2)
        for more in ({"points": points, "compat": "official"}, {"soft": SOFT, "pairs": pairs}):
            options = {"mask": mask, "groups": labels, **more}

            class Traced:
                noise_uncertainty_loss = staticmethod(
                    torch.compile(sk.noise_uncertainty_loss, fullgraph=True, backend="aot_eager")
                )

            assert_same(evaluate(Traced, maps, m, distance, **options), evaluate(sk, maps, m, distance, **options))

    def test_nothing_of_full_size_is_kept(self):
        maps, m, distance, _, mask = setting((1, 1, 64, 64), dtype=torch.float32)
        leaves = [u.requires_grad_() for u in maps]
        distance = distance.float()
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ):
            sk.noise_uncertainty_loss(leaves[0], leaves[1:], m, distance, mask=mask, weights=(1, 0, 1))
        given = {x.untyped_storage().data_ptr() for x in (*leaves, distance, mask)}
        assert sum(x.untyped_storage().nbytes() for p, x in kept.items() if p not in given) < 1000

    def test_module(self):
        maps, m, distance, labels, mask = setting()
        module = sk.NoiseUncertaintyLoss(near=3.0, weights=(1.0, 2.0, 3.0), return_terms=True)
        got, _ = module(maps[0], maps[1:], m, distance, mask=mask, groups=labels)
        expected = sk.noise_uncertainty_loss(
            maps[0], maps[1:], m, distance, near=3.0, weights=(1, 2, 3), mask=mask, groups=labels
        )
        assert torch.equal(got, expected)
        assert "near=3.0" in repr(module)


class TestSoft:
    @given(
        shape=st.sampled_from([(1, 1, 1, 1), (3, 1, 5, 2), (2, 1, 7, 6), (2, 1, 3, 4, 5)]),
        levels=st.integers(1, 3),
        masked=st.booleans(),
        grouped=st.booleans(),
        official=st.booleans(),
        infinite=st.booleans(),
        kernels=st.sampled_from([(3, 5), (1, 1), (5, 3)]),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=25)
    def test_closed_form(self, shape, levels, masked, grouped, official, infinite, kernels, seed):
        maps, m, distance, labels, mask = setting(shape, levels, seed)
        if infinite:
            distance = torch.where(distance > 6, math.inf, distance)
        soft = SOFT._replace(normal_kernel=kernels[0], patch_kernel=kernels[1])
        generators = [torch.Generator().manual_seed(seed) for _ in range(4)]
        options = {
            "soft": soft,
            "mask": mask if masked else None,
            "groups": labels if grouped else None,
            "compat": "official" if official else None,
        }
        weights = (2.0, 3.0, 0.5)
        got, expected = (
            evaluate(space, maps, m, distance, weights=weights, generator=generator, **options)
            for space, generator in zip((sk, sk.reference), generators, strict=False)
        )
        assert_same(got, expected)
        dot = sum(w * float(x) for w, x in zip(weights, got[1], strict=True))
        assert float(got[0]) == pytest.approx(dot, rel=1e-12, abs=1e-300)
        g = maps[1].flip(2)
        results = []
        for space, generator in zip((sk, sk.reference), generators[2:], strict=True):
            leaf = maps[0].clone().requires_grad_()
            loss = space.gradient_uncertainty_loss(leaf, g, distance, generator=generator, **options)
            (gradient,) = torch.autograd.grad(loss, leaf)
            results.append((loss.detach(), (), [gradient]))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=FLOAT64_VALUE, atol=FLOAT64_VALUE)
        torch.testing.assert_close(results[0][2], results[1][2], rtol=FLOAT64_GRADIENT, atol=FLOAT64_GRADIENT)

    @pytest.mark.parametrize("shape", [(2, 1, 7, 6), (2, 1, 3, 4, 5)])
    @pytest.mark.parametrize("size", [1, 3, 5])
    def test_windows(self, shape, size):
        """Means of what counts, of nothing else: sums by SciPy."""
        maps, _, _, _, mask = setting(shape)
        for counted in (None, mask):
            inside = torch.ones_like(maps[0]) if counted is None else counted.double()
            mean, adjoint = torch.empty_like(maps[0]), torch.empty_like(maps[0])
            for i in range(2):
                total, number = (
                    scipy.ndimage.uniform_filter(x, size, mode="constant") * size ** (len(shape) - 2)
                    for x in ((maps[0] * inside)[i, 0].numpy(), inside[i, 0].numpy())
                )
                number = torch.from_numpy(number).round()
                mean[i, 0] = torch.from_numpy(total) / number.clamp_min(1)
                up = (maps[1][i, 0] / number.clamp_min(1)).numpy()
                adjoint[i, 0] = inside[i, 0] * torch.from_numpy(
                    scipy.ndimage.uniform_filter(up, size, mode="constant") * size ** (len(shape) - 2)
                )
            leaf = maps[0].clone().requires_grad_()
            got = soft_op.WindowMeanFunction.apply(leaf, size, counted, False)
            torch.testing.assert_close(got, mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(sk.reference.window_mean(maps[0], size, counted), mean, rtol=1e-10, atol=1e-12)
            (gradient,) = torch.autograd.grad(got, leaf, maps[1])
            torch.testing.assert_close(gradient, adjoint, rtol=1e-10, atol=1e-12)

    def test_sharp_indicators_over_all_pairs_are_the_ranking(self):
        """The hard form's sum over violating pairs, divided by the number of pairs instead."""
        maps, _, _, labels, mask = setting((1, 1, 6, 5))
        distance = torch.randint(0, 4, (1, 1, 6, 5), generator=torch.Generator().manual_seed(0)).double()
        soft = sk.SoftThresholds(d_g=1.5, alpha=1e4, normal_kernel=1)
        every = torch.combinations(torch.arange(30), 2)
        for relation in ("decreasing", "increasing"):
            options = {"groups": labels, "mask": mask, "relation": relation}
            got = sk.gradient_uncertainty_loss(maps[0], maps[1], distance, soft=soft, pairs=every, **options)
            ranking = sk.gradient_uncertainty_loss(maps[0], maps[1], distance, max_distance=1.5, **options)
            on = [i for i in range(30) if bool(mask.flatten()[i]) and float(distance.flatten()[i]) <= 1.5]
            u, g, y = (x.flatten().tolist() for x in (maps[0], maps[1], labels))
            products = [(u[i] - u[j]) * (g[i] - g[j]) for i, j in itertools.combinations(on, 2) if y[i] == y[j]]
            sign = 1 if relation == "decreasing" else -1
            violating = sum(sign * p > 0 for p in products)
            assert float(got) == pytest.approx(float(ranking) * violating / len(products))

    def test_far_pairs_are_pushed_to_zero(self):
        """Beyond d_f the distance loss is coef_far times the mean of u_i + u_j."""
        maps, m, distance, _, _ = setting((2, 1, 4, 6))
        far = torch.full_like(distance, math.inf)
        pairs = torch.arange(48).view(-1, 2)
        _, terms, gradients = evaluate(sk, maps, m, far, soft=SOFT, pairs=pairs, weights=(1, 1, 1))
        expected = SOFT.coef_far * sum(2 * float(u.mean()) for u in maps) / 3
        assert float(terms.far) == pytest.approx(expected)
        assert float(terms.mu) == float(terms.d) == 0
        for g in gradients:
            torch.testing.assert_close(g, torch.full_like(g, SOFT.coef_far / 3 / len(pairs)))

    def test_a_batch_without_boundary_is_not_about_what_is_far(self):
        maps, m, _, labels, _ = setting()
        distance = torch.full((2, 1, 7, 6), 50.0, dtype=torch.float64)
        assert float(sk.gradient_uncertainty_loss(maps[0], maps[1], distance, soft=SOFT)) == 0
        options = {"soft": SOFT, "weights": (1, 0, 0), "groups": labels}
        loss, _, gradients = evaluate(sk, maps, m, distance, **options)
        assert float(loss) == 0
        assert all(bool((g == 0).all()) for g in gradients)

    @pytest.mark.parametrize("across", [False, True])
    def test_drawn_pairs(self, across):
        like = torch.zeros((3, 1, 5, 5))
        wanted = torch.zeros((3, 1, 5, 5), dtype=torch.bool)
        wanted[0, 0, :2] = wanted[1, 0, 2:4, :3] = True

        def draw(seed, number=None):
            return soft_op.draw_pairs(like, wanted, number, torch.Generator().manual_seed(seed), across=across)

        pairs = draw(0)
        assert pairs.shape == (37 if across else 36, 2)
        assert len(pairs.unique()) == pairs.numel()
        assert 0 <= int(pairs.min()) <= int(pairs.max()) < 75
        assert torch.equal(pairs, draw(0))
        assert not torch.equal(pairs, draw(1))
        image = pairs // 25
        if across:
            assert bool((image[:, 0] != image[:, 1]).any())
            assert draw(0, 4).shape == (4, 2)
        else:
            assert bool((image[:, 0] == image[:, 1]).all())
            assert draw(0, 4).shape == (12, 2)
            chosen = wanted.flatten()[pairs].view(3, 12, 2).flatten(1)
            # Those wanted first: 10 in the first image, 6 in the second, none in the third.
            assert [row.sum().item() for row in chosen] == [10, 6, 0]
            assert bool(chosen[0, :10].all())
            assert bool(chosen[1, :6].all())

    def test_pairs_are_drawn_uniformly(self):
        """Every pair of the wanted voxels equally often: 3 x 5000 of 15 pairs, within five standard deviations."""
        like, wanted = torch.zeros((1, 1, 3, 5)), torch.zeros((1, 1, 3, 5), dtype=torch.bool)
        wanted.view(-1)[[0, 3, 4, 9, 11, 14]] = True
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros((15, 15))
        for _ in range(5000):
            pairs = soft_op.draw_pairs(like, wanted, 3, generator, across=False).sort(1).values
            counts.index_put_(tuple(pairs.unbind(1)), torch.ones(3), accumulate=True)
        found = counts[counts > 0]
        assert len(found) == 15
        assert float((found - 1000).abs().max()) < 5 * math.sqrt(5000 * 0.2 * 0.8)

    def test_a_nan_is_named(self):
        maps, m, distance, _, mask = setting()
        bad = maps[1].clone()
        bad[0, 0, 0, 0] = math.nan
        mask[0, 0, 0, 0] = True
        near = torch.zeros_like(distance)
        with pytest.raises(ValueError, match=r"noisy\[0\]: expected finite"):
            sk.noise_uncertainty_loss(maps[0], [bad], m[:1], near, soft=SOFT, mask=mask)
        with pytest.raises(ValueError, match=r"uncertainty: expected finite"):
            # So many pairs that none of some forty voxels is left out.
            sk.gradient_uncertainty_loss(bad, maps[0], near, soft=SOFT, mask=mask, num_pairs=1000)
        mask[0, 0, 0, 0] = False
        assert math.isfinite(float(sk.noise_uncertainty_loss(maps[0], [bad], m[:1], near, soft=SOFT, mask=mask)))
        assert math.isfinite(float(sk.gradient_uncertainty_loss(bad, maps[0], near, soft=SOFT, mask=mask)))

    def test_no_triton_kernels(self):
        maps, m, distance, _, _ = setting(dtype=torch.float32)
        with sk.backend("triton"), pytest.raises(sk.BackendUnavailableError):
            sk.noise_uncertainty_loss(maps[0], maps[1:], m, distance, soft=SOFT)


def test_published_distance_loss_of_prius_falls_as_violations_rise():
    d = torch.arange(20.0, dtype=torch.float64)
    samples = torch.arange(20)[None]
    losses = []
    for violations in (2, 6, 20):
        u = -d.clone() / 100
        u[:violations] = d[:violations] / 100
        losses.append(float(sk.reference.prius_distance_loss(u, d, samples)))
    assert losses[0] > losses[1] > losses[2]


class TestPatches:
    @given(
        dims=st.integers(2, 3),
        extra=st.tuples(*(st.integers(0, 8),) * 3),
        images=st.integers(1, 3),
        classes=st.integers(1, 4),
        number=st.integers(1, 4),
        size=st.sampled_from([1, 3, 5]),
        share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=30)
    def test_all_at_once_is_one_by_one(self, dims, extra, images, classes, number, size, share, seed):
        g = torch.Generator().manual_seed(seed)
        shape = (images, *(size + e for e in extra[:dims]))
        priority = torch.rand(shape, generator=g)
        target = torch.randint(-1, classes, shape, generator=g)
        candidates = torch.rand(shape, generator=g) < share
        given = (priority, target, candidates, classes, number, size)
        centres = patches_reference.patch_centres(*given)
        assert torch.equal(patches.patch_centres(*given), centres)
        image = torch.rand((images, 2, *shape[1:]), generator=g)
        noise = torch.rand((images, 2, classes * number, size**dims), generator=g)
        expected = patches_reference.add_patches(image, centres, noise, size)
        torch.testing.assert_close(patches.add_patches(image, centres, noise, size), expected)

    def sample(self, shape=(3, 2, 32, 28), seed=0, hard_share=0.3, **options):
        g = torch.Generator().manual_seed(100)
        n, _, *spatial = shape
        target = torch.zeros((n, *spatial), dtype=torch.uint8)
        target[:, 4:20, 3:13] = 1
        target[:, 10:24, 13:26] = 2
        distance = sk.boundary_distance(target, spatial_dims=len(spatial))
        hard = torch.rand((n, 1, *spatial), generator=g) < hard_share
        image = torch.randn(shape, generator=g)
        before = image.clone()
        generator = torch.Generator().manual_seed(seed)
        got = sk.sample_noise_patches(image, target, distance, hard, generator=generator, **options)
        assert torch.equal(image, before)
        return got, image, target, distance[:, 0], hard[:, 0]

    @pytest.mark.parametrize("shape", [(3, 2, 32, 28), (2, 1, 32, 28, 7)])
    @pytest.mark.parametrize("size", [3, 5])
    def test_rules(self, shape, size):
        number = 2
        got, image, target, distance, hard = self.sample(shape, patch_size=size, patches_per_class=number)
        n, _, *spatial = shape
        centres, radius = got.centres, size // 2
        assert centres.shape == (n, 3 * number, len(spatial))
        assert centres.dtype == torch.int64
        assert bool((centres >= radius).all())
        assert bool((centres < torch.tensor(spatial) - radius).all())
        apart = (centres[:, :, None] - centres[:, None]).abs().amax(-1)
        assert bool((apart[:, ~torch.eye(3 * number, dtype=torch.bool)] >= size).all())
        at = (torch.arange(n)[:, None], *centres.unbind(-1))
        assert torch.equal(target[at].long(), torch.arange(3).repeat_interleave(number).expand(n, -1))
        assert bool(hard[at].all())
        assert bool((distance[at][:, :number] <= 4).all())
        # Noise is in the patches and nowhere else, and not the same in both images.
        inside = torch.zeros((n, *spatial), dtype=torch.bool)
        for i, p in itertools.product(range(n), range(3 * number)):
            inside[(i, *(slice(c - radius, c + radius + 1) for c in centres[i, p].tolist()))] = True
        added = [x - image for x in got.images]
        for noise in added:
            assert torch.equal((noise != 0).all(1), inside)
        assert bool((added[0] != added[1]).any(1)[inside].all())

    def test_noise_has_the_means_and_the_spread(self):
        got, image, *_ = self.sample((16, 2, 40, 40), patch_size=7, mean_range=(-2.0, 3.0), std=0.5)
        assert got.means.shape == (2,)
        assert bool(((got.means >= -2) & (got.means <= 3)).all())
        for x, mean in zip(got.images, got.means, strict=True):
            noise = (x - image)[x != image]
            n = noise.numel()
            assert n > 10_000
            assert float((noise.mean() - mean).abs()) < 5 * 0.5 / math.sqrt(n)
            assert abs(float(noise.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * n)

    def test_the_generator_decides(self):
        first, second, other = (self.sample(seed=s)[0] for s in (3, 3, 4))
        assert all(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))
        assert torch.equal(first.means, second.means)
        assert torch.equal(first.centres, second.centres)
        assert not torch.equal(first.centres, other.centres)
        with sk.backend("reference"):
            slow = self.sample(seed=3)[0]
        assert torch.equal(first.centres, slow.centres)
        torch.testing.assert_close(first.images, slow.images)

    def test_every_hard_voxel_is_as_likely(self):
        """4000 images with six hard voxels of one class, one patch: each about 667 times."""
        n = 4000
        hard = torch.zeros((n, 7, 8), dtype=torch.bool)
        where = [(1, 1), (2, 6), (3, 3), (4, 2), (5, 5), (5, 6)]
        hard[:, [y for y, _ in where], [x for _, x in where]] = True
        ones = torch.ones((n, 7, 8), dtype=torch.long)
        generator = torch.Generator().manual_seed(0)
        got = sk.sample_noise_patches(
            torch.zeros((n, 1, 7, 8)), ones, torch.zeros((n, 7, 8)), hard,
            patches_per_class=1, num_classes=2, generator=generator,
        )  # fmt: skip
        chosen = [tuple(c) for c in got.centres[:, 1].tolist()]
        counts = [chosen.count(v) for v in where]
        assert sum(counts) == n
        assert max(abs(c - n / 6) for c in counts) < 5 * math.sqrt(n / 6 * 5 / 6)

    def test_what_is_missing_is_filled(self):
        got, _, target, _, _ = self.sample(hard_share=0.0)
        assert bool((got.centres >= 0).all())
        at = (torch.arange(3)[:, None], *got.centres.unbind(-1))
        assert len(target[at].unique()) > 1

    def test_what_does_not_fit_is_none(self):
        """Twelve patches of width 3 in 8 x 8, for which the published search never ends."""
        blank = torch.zeros((5, 8, 8), dtype=torch.long)
        image = torch.randn((5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        got = sk.sample_noise_patches(
            image, blank, torch.zeros((5, 8, 8)), torch.ones((5, 8, 8)), num_classes=4, patches_per_class=3
        )
        taken = (got.centres >= 0).all(-1)
        assert torch.equal(taken, (got.centres >= 0).any(-1))
        # Four always fit, as long as they do not stand in each other's way; never more.
        assert bool(((taken.sum(1) >= 1) & (taken.sum(1) <= 4)).all())
        assert bool((got.centres[~taken] == -1).all())
        noised = (got.images[0] != image).flatten(1).sum(1)
        assert torch.equal(noised, 9 * taken.sum(1))
        # And the loss takes them as they are.
        u = torch.rand((3, 5, 1, 8, 8))
        loss = sk.noise_uncertainty_loss(
            u[0], u[1:], got.means, torch.zeros((5, 8, 8)), points=got.centres, weights=(1, 1, 0)
        )
        assert math.isfinite(float(loss))

    def test_labels(self):
        """Ignored voxels belong to no class; one-hot labels count as their index."""
        image, distance, hard = torch.zeros((1, 1, 9, 9)), torch.zeros((1, 9, 9)), torch.ones((1, 9, 9))
        target = torch.full((1, 9, 9), 255)
        target[0, 4, 4] = 1
        options = {"patches_per_class": 1, "ignore_index": 255}
        got = sk.sample_noise_patches(image, target, distance, hard, **options)
        assert got.centres.shape == (1, 2, 2)
        assert got.centres[0, 1].tolist() == [4, 4]
        assert sk.sample_noise_patches(image, target, distance, hard, num_classes=5, **options).centres.shape[1] == 5
        index = torch.randint(0, 3, (1, 9, 9), generator=torch.Generator().manual_seed(0))
        one_hot = torch.nn.functional.one_hot(index, 3).movedim(-1, 1)
        a, b = (
            sk.sample_noise_patches(
                image, y, distance, hard, num_classes=3, generator=torch.Generator().manual_seed(1)
            ).centres
            for y in (index, one_hot)
        )
        assert torch.equal(a, b)

    def test_image_dtypes(self):
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            image = torch.zeros((1, 1, 9, 9), dtype=dtype)
            got = sk.sample_noise_patches(
                image, torch.zeros((1, 9, 9), dtype=torch.long), torch.zeros((1, 9, 9)), torch.ones((1, 9, 9))
            )
            assert all(x.dtype == dtype for x in got.images)
            assert sk.add_gaussian_noise(image).dtype == dtype

    def test_custom_ops_are_well_formed(self):
        g = torch.Generator().manual_seed(0)
        priority = torch.rand((2, 7, 8), generator=g)
        target = torch.randint(0, 2, (2, 7, 8), generator=g)
        given = (priority, target, target > 0, 2, 3, 3)
        torch.library.opcheck(patches_op.patch_centres.op, given)
        centres = patches_op.patch_centres(*given)
        image, noise = torch.rand((2, 3, 7, 8), generator=g), torch.rand((2, 3, 6, 9), generator=g)
        torch.library.opcheck(patches_op.add_patches.op, (image, centres, noise, 3))


def test_nothing_waits_for_the_device():
    """On tensors without values, as a GPU's are to the host, whatever looks at one raises."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    with pytest.raises(RuntimeError):
        bool(empty(1))
    maps, levels, mask = [empty(2, 48) for _ in range(3)], empty(3, 2), empty(2, 48, dtype=torch.bool)
    given = maps, levels, empty(2, 48), mask
    terms = closed_form.Terms(4.0, True, True)
    found = closed_form.finalise(closed_form.sums(*given, terms), 1.0, 1.0, None)
    closed_form.gradient(*given, found.coefficients, terms, True, True)

    like = empty(2, 1, 6, 8)
    pairs = soft_op.draw_pairs(like, mask, 5, None, across=False)
    assert pairs.shape == (10, 2)
    options = {"groups": mask, "counted": mask.view_as(like), "official": False, "relation": "decreasing"}
    soft_op.soft_gradient_loss(like, like, like, pairs, SOFT, process_group=None, **options)

    labels = empty(2, 6, 8, dtype=torch.long)
    centres = patches.patch_centres(empty(2, 6, 8), labels, labels > 0, 3, 2, 3)
    assert centres.shape == (2, 6, 2)
    patches.add_patches(like, centres, empty(2, 1, 6, 9), 3)


def test_whole_image_noise_finds_hard_samples():
    image = torch.zeros((4, 2, 32, 32))
    noised = sk.add_gaussian_noise(image, generator=torch.Generator().manual_seed(0))
    n = noised.numel()
    assert float((noised.mean() - 0.5).abs()) < 5 * 0.3 / math.sqrt(n)
    assert abs(float(noised.std()) - 0.3) < 5 * 0.3 / math.sqrt(2 * n)
    assert bool((image == 0).all())
    assert torch.equal(noised, sk.add_gaussian_noise(image, generator=torch.Generator().manual_seed(0)))
    assert len(noised.unique()) > 0.9 * n

    clean = torch.tensor([0.1, 0.5, 0.5, math.nan]).view(1, 1, 2, 2).requires_grad_()
    hard = sk.hard_sample_mask(clean, torch.tensor([0.2, 0.5, 0.4, 0.1]).view(1, 1, 2, 2))
    assert hard.flatten().tolist() == [False, True, True, False]
    assert hard.dtype == torch.bool
    assert not hard.requires_grad


def test_one_step_of_active_noise():
    """As a training loop puts the parts together: nothing but the network is missing."""
    g = torch.Generator().manual_seed(0)
    image = torch.randn((2, 1, 24, 24), generator=g)
    target = torch.zeros((2, 24, 24), dtype=torch.long)
    target[:, 6:16, 5:18] = 1
    network = torch.nn.Conv2d(1, 2, 3, padding=1)
    distance = sk.boundary_distance(target)

    def vacuity(x):
        return sk.dirichlet_uncertainty(network(x), measures="vacuity").vacuity

    clean = vacuity(image)
    with torch.no_grad():
        hard = sk.hard_sample_mask(clean, vacuity(sk.add_gaussian_noise(image, generator=g)))
    noise = sk.sample_noise_patches(image, target, distance, hard, num_classes=2, generator=g)
    loss, terms = sk.noise_uncertainty_loss(
        clean, [vacuity(x) for x in noise.images], noise.means, distance, points=noise.centres, return_terms=True
    )
    loss.backward()
    assert float(terms.mu) > 0
    assert float(network.weight.grad.abs().sum()) > 0
