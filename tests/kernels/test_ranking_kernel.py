"""`pairwise_ranking_loss` in Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import UPSTREAM, laid_out, largest_error, reserved, with_gradient
from tolerances import FLOAT32_GRADIENT, FLOAT32_VALUE

import sure_kernels as sk
from sure_kernels.functional import RELATIONS
from sure_kernels.ops.ranking import closed_form, kernel
from sure_kernels.ops.ranking import op as custom

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(params=["direct", "levels"])
def way(request, monkeypatch):
    """Both ways for few points: tiles of 8 leave several levels above them."""
    small_tiles(monkeypatch, request.param)
    return request.param


def small_tiles(monkeypatch, way):
    if way == "levels":
        monkeypatch.setattr(kernel, "MOST_DIRECT", 0)
    monkeypatch.setattr(kernel, "TILE", 8)
    monkeypatch.setattr(kernel, "ROWS", 4)
    monkeypatch.setattr(kernel, "COLUMNS", 4)
    monkeypatch.setattr(kernel, "CHUNK", 4)


def points(shape, device, seed=0, levels=16):
    """Values and scores with ties; a mask, groups."""
    g = torch.Generator().manual_seed(seed)
    x, y = ((torch.rand(shape, generator=g) * levels).round() / levels for _ in range(2))
    return (
        x.to(device),
        y.to(device),
        (torch.rand(shape, generator=g) < 0.7).to(device),
        (torch.randint(0, 3, shape, generator=g).to(device)),
    )


def compare(values, scores, kind="dense", tolerance=FLOAT32_GRADIENT, **options):
    """Loss and gradient against the reference at the same numbers, and the number of pairs."""
    (got,), gradient = with_gradient(lambda t: (sk.pairwise_ranking_loss(t, scores, **options),), values, kind)
    (expected,), expected_gradient = with_gradient(
        lambda t: (sk.reference.pairwise_ranking_loss(t, scores, **options),), values.double(), kind
    )
    assert got.dtype == torch.float32
    assert gradient.dtype == values.dtype
    assert abs(float(got) - float(expected)) <= FLOAT32_VALUE * max(1.0, float(expected))
    if float(expected_gradient.abs().max()) == 0:
        assert not gradient.any()
    else:
        assert largest_error(gradient, expected_gradient) <= tolerance


@pytest.mark.usefixtures("poisoned_memory", "way")
class TestValues:
    @pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 33, 70])
    @pytest.mark.parametrize("relation", RELATIONS)
    def test_sizes(self, n, relation, device):
        values, scores, _, _ = points((1, n), device)
        compare(values, scores, relation=relation)

    def test_counts(self, device):
        values, scores, mask, groups = points((3, 50), device)
        sets = closed_form.sets_of(values, scores, mask, groups, "decreasing")
        got, expected = kernel.violating_pairs(sets), closed_form.violating_pairs(sets)
        assert torch.equal(got.number, expected.number)
        torch.testing.assert_close(got.difference, expected.difference, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.total, expected.total, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        values, scores, mask, _ = points((2, 30), device)
        compare(values.to(dtype), scores.to(dtype), mask=mask, tolerance=2**-7 if dtype == torch.bfloat16 else 2**-10)

    def test_scores_of_full_precision_count_in_full(self, device):
        values = torch.arange(20.0, device=device)[None]
        scores = 1.0 + 1e-12 * values.double()
        compare(values, scores)
        assert float(sk.pairwise_ranking_loss(values, scores)) > 0

    @pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
    @pytest.mark.parametrize("kind", UPSTREAM[:2])
    def test_layouts(self, layout, kind, device):
        values, scores, _, groups = points((2, 1, 4, 5), device)
        compare(laid_out(values, layout), laid_out(scores, layout), kind, groups=groups)

    def test_nothing_to_rank(self, device):
        values, scores, _, _ = points((2, 12), device)
        for mask in (torch.zeros_like(values), torch.arange(24, device=device).view(2, 12) == 15):
            compare(values, scores, mask=mask)
        compare(torch.full_like(values, 0.5), scores)
        compare(values, 1 - values)

    def test_points_that_violate_nothing_have_no_gradient(self, device):
        """Exactly none: what rounding leaves of sums that cancel does not count."""
        values, scores, _, _ = points((1, 60), device, levels=9_999_991)
        values, scores = values.sort(1, descending=True).values, scores.sort(1).values.double().sqrt()
        values[:, [20, 21]] = values[:, [21, 20]]
        _, gradient = with_gradient(lambda t: (sk.pairwise_ranking_loss(t, scores),), values, "dense")
        assert gradient.nonzero()[:, 1].tolist() == [20, 21]

    def test_nan_is_not_lost(self, device, monkeypatch):
        monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
        values, scores, _, _ = points((1, 20), device)
        nothing = torch.full_like(values, float("nan"))
        assert torch.isnan(sk.pairwise_ranking_loss(nothing, scores))
        assert torch.isnan(sk.pairwise_ranking_loss(values, nothing))

    def test_runs_repeat_to_the_bit(self, device):
        values, scores, mask, _ = points((2, 60), device, levels=10_000)
        first, second = (
            with_gradient(lambda t: (sk.pairwise_ranking_loss(t, scores, mask=mask),), values, "dense")
            for _ in range(2)
        )
        assert torch.equal(first[0][0], second[0][0])
        assert torch.equal(first[1], second[1])

    def test_covariance(self, device):
        values, scores, mask, groups = points((3, 40), device)
        compare(values, values + scores, mask=mask, groups=groups, method="covariance")


@pytest.mark.parametrize("sizes", [[5], [4, 0, 9], []])
def test_blocks(sizes, device):
    table, bounds = kernel._blocks(sizes, 4, torch.device(device))
    slots = [range(first, min(first + 4, end)) for _, end, first in table.T.tolist()]
    assert [s for block in slots for s in block] == list(range(sum(sizes)))
    assert len(bounds) == len(sizes) + 1
    for i, size in enumerate(sizes):
        mine = table[:, bounds[i] : bounds[i + 1]]
        assert mine.shape[1] == -(-size // 4)
        assert bool((mine[0] == sum(sizes[:i])).all())


def test_sizes_of_the_table(device):
    """With the block sizes that are shipped, on both sides of the border between the ways."""
    values, scores, _, _ = points((1, 3 * kernel.TILE // 2), device, levels=10_000)
    sets = closed_form.sets_of(values, scores, None, None, "decreasing")
    expected = closed_form.violating_pairs(sets)
    for most in (len(sets.value), len(sets.value) - 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "MOST_DIRECT", most)
            got = kernel.violating_pairs(sets)
        assert torch.equal(got.number, expected.number)
        torch.testing.assert_close(got.difference, expected.difference, rtol=0, atol=1e-9)


class Far:
    """A kernel whose points, or blocks, lie behind 2^31 others that are nowhere touched."""

    OFFSET = 2**31 + 8

    def __init__(self, launched, moved: str, indices: str):
        self.launched, self.moved, self.indices = launched, moved.split(), indices.split()

    def __getitem__(self, grid):
        def launch(*args, **options):
            given, outputs = [], []
            for name, x in zip(self.launched.arg_names, args, strict=False):
                if name in self.indices:
                    x = x + self.OFFSET
                if name in self.moved:
                    storage = reserved(self.OFFSET + len(x), x.dtype, x.device)
                    storage[self.OFFSET :] = x
                    outputs.append((x, storage))
                    x = storage
                given.append(x)
            self.launched[grid](*given, **options)
            for x, storage in outputs:
                x.copy_(storage[self.OFFSET :])

        return launch


def test_offsets_past_two_to_the_31(way, device, monkeypatch):
    values, scores, mask, _ = points((2, 40), device)
    sets = closed_form.sets_of(values, scores, mask, None, "decreasing")
    expected = kernel.violating_pairs(sets)
    state = "p_rank p_score p_difference p_count p_place"
    pairs = "p_key p_score p_value p_difference p_count p_place p_out"
    for name, moved, indices in (
        ("pairs_kernel", pairs, "p_blocks p_place" if way == "levels" else "p_blocks"),
        ("reduce_kernel", "p_total p_number", "p_bounds"),
        ("split_sums_kernel", state, "p_blocks"),
        ("split_scan_kernel", "", "p_blocks"),
        ("split_kernel", f"{state} p_rank_out p_score_out p_difference_out p_count_out p_place_out", "p_blocks"),
    ):
        monkeypatch.setattr(kernel, name, Far(getattr(kernel, name), moved, indices))
    got = kernel.violating_pairs(sets)
    assert bool(expected.number.all())
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_custom_op_is_well_formed(device):
    values, scores, mask, groups = points((2, 30), device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for method in ("exact", "covariance"):
        options = ("decreasing", method, None, False, "triton")
        torch.library.opcheck(custom.pairwise_ranking.op, (values, scores, mask, groups, *options), test_utils=checks)


def test_full_graph(device):
    values, scores, mask, _ = points((2, 1, 5, 6), device)
    compiled = torch.compile(sk.pairwise_ranking_loss, fullgraph=True, backend="aot_eager")
    eager = with_gradient(lambda t: (sk.pairwise_ranking_loss(t, scores, mask=mask),), values, "dense")
    traced = with_gradient(lambda t: (compiled(t, scores, mask=mask),), values, "dense")
    assert torch.equal(eager[0][0], traced[0][0])
    assert torch.equal(eager[1], traced[1])
