"""The voxelwise terms of `noise_uncertainty_loss` in Triton against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import HALF_TOLERANCE, LAYOUTS, laid_out, largest_error, reserved
from tolerances import FLOAT32_GRADIENT, FLOAT32_VALUE

import sure_kernels as sk
from sure_kernels.ops.noise import kernel
from sure_kernels.ops.noise import op as custom
from sure_kernels.ops.noise.closed_form import number_of_rows

pytestmark = pytest.mark.usefixtures("triton_backend")

SHAPES = [(1, 1, 1, 1), (3, 1, 5, 7), (2, 1, 3, 4, 5)]
# L_d has kernels, and tests, of its own.
WEIGHTS = (2.0, 0.0, 0.5)


@pytest.fixture
def small_blocks(monkeypatch):
    several_blocks(monkeypatch)


def several_blocks(monkeypatch):
    """Several blocks an image, several steps a program, the last of them partly outside."""
    monkeypatch.setattr(kernel, "block_size", lambda maps: 16)
    monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", 2)


def case(shape, device, levels=2, seed=0):
    """Maps, levels that differ from image to image, distance, mask and points of which some are none."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.rand(shape, generator=g) for _ in range(levels + 1)]
    m = torch.rand((levels, shape[0]), generator=g)
    distance = 8 * torch.rand(shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.8
    points = torch.stack([torch.randint(-1, s, (shape[0], 6), generator=g) for s in shape[2:]], -1)
    return [u.to(device) for u in maps], *(x.to(device) for x in (m, distance, mask, points))


def evaluate(function, maps, *args, upstream=2.5, **options):
    """(loss, terms, gradients of every map)."""
    leaves = [u.detach().requires_grad_() for u in maps]
    loss, terms = function(leaves[0], leaves[1:], *args, weights=WEIGHTS, return_terms=True, **options)
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    return loss.detach(), torch.stack(list(terms)), list(gradients)


def compare(maps, levels, distance, tolerance=FLOAT32_GRADIENT, **options):
    loss, terms, gradients = evaluate(sk.noise_uncertainty_loss, maps, levels, distance, **options)
    expected_loss, expected_terms, expected = evaluate(
        sk.reference.noise_uncertainty_loss, [u.double() for u in maps], levels, distance, **options
    )
    assert loss.dtype == terms.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=FLOAT32_VALUE, atol=FLOAT32_VALUE)
    torch.testing.assert_close(terms.double(), expected_terms, rtol=FLOAT32_VALUE, atol=FLOAT32_VALUE)
    assert all(a.dtype == u.dtype for u, a in zip(maps, gradients, strict=True))
    got, wanted = torch.stack(gradients), torch.stack(expected)
    assert largest_error(got, wanted) <= tolerance or not (bool(got.any()) or bool(wanted.any()))


@pytest.mark.usefixtures("poisoned_memory", "small_blocks")
class TestValues:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("levels", "compat"), [(1, None), (2, "official"), (5, None), (5, "official")])
    def test_levels(self, shape, levels, compat, device):
        maps, m, distance, mask, _ = case(shape, device, levels)
        compare(maps, m, distance, mask=mask if levels > 1 else None, compat=compat)

    @pytest.mark.parametrize("shape", SHAPES[1:])
    @pytest.mark.parametrize("compat", [None, "official"])
    def test_points(self, shape, compat, device):
        maps, m, distance, mask, points = case(shape, device)
        compare(maps, m, distance, points=points, mask=mask, compat=compat)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, device):
        maps, m, distance, mask, _ = case(SHAPES[2], device)
        maps = [laid_out(u, layout) for u in maps]
        compare(maps, m, laid_out(distance, layout), mask=laid_out(mask.float(), "transposed"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        maps, m, distance, mask, _ = case(SHAPES[2], device)
        compare([u.to(dtype) for u in maps], m, distance, HALF_TOLERANCE[dtype], mask=mask)

    @pytest.mark.parametrize("distance_is", [0.0, 4.0, 4.0000005, math.inf, math.nan])
    def test_regions(self, distance_is, device):
        """All near, all far, none of both."""
        maps, m, distance, _, _ = case(SHAPES[1], device)
        compare(maps, m, torch.full_like(distance, distance_is))

    def test_voxels_that_do_not_count(self, device):
        maps, m, distance, mask, _ = case(SHAPES[2], device)
        compare([torch.where(mask, u, math.nan) for u in maps], m, distance, mask=mask)
        compare([torch.full_like(u, math.nan) for u in maps], m, distance, mask=torch.zeros_like(mask))

    def test_a_nan_is_named(self, device, monkeypatch):
        monkeypatch.setenv("SURE_KERNELS_CHECKS", "1")
        maps, m, distance, _, _ = case(SHAPES[1], device)
        maps[1][0, 0, 2, 3] = math.nan
        for d in (0.0, 9.0):
            with pytest.raises(ValueError, match=r"noisy\[0\]: expected finite"):
                sk.noise_uncertainty_loss(maps[0], maps[1:], m, torch.full_like(distance, d), weights=WEIGHTS)

    def test_equal_levels_and_equal_maps(self, device):
        maps, m, distance, _, _ = case(SHAPES[1], device)
        compare(maps, torch.full_like(m, 0.4), distance)
        compare([maps[0]] * 3, m, distance)

    def test_runs_repeat_to_the_bit(self, device):
        maps, m, distance, mask, points = case(SHAPES[2], device)
        for options in ({}, {"points": points}):
            first, second = (
                evaluate(sk.noise_uncertainty_loss, maps, m, distance, mask=mask, **options) for _ in range(2)
            )
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])
            assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


def test_a_clean_map_without_gradient(device):
    maps, m, distance, mask, _ = case(SHAPES[2], device)
    expected = evaluate(sk.noise_uncertainty_loss, maps, m, distance, mask=mask)
    leaves = [u.detach().requires_grad_() for u in maps[1:]]
    loss = sk.noise_uncertainty_loss(maps[0], leaves, m, distance, mask=mask, weights=WEIGHTS)
    for got, e in zip(torch.autograd.grad(2.5 * loss, leaves), expected[2][1:], strict=True):
        assert torch.equal(got, e)


def test_blocks_do_not_matter(device, monkeypatch):
    maps, m, distance, mask, _ = case((2, 1, 13, 11), device)
    results = []
    for block, programs in ((512, 2048), (32, 1), (64, 3)):
        monkeypatch.setattr(kernel, "block_size", lambda maps, block=block: block)
        monkeypatch.setattr(kernel, "_ENOUGH_PROGRAMS", programs)
        results.append(evaluate(sk.noise_uncertainty_loss, maps, m, distance, mask=mask))
    for loss, terms, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=FLOAT32_VALUE, atol=0)
        torch.testing.assert_close(terms, results[0][1], rtol=FLOAT32_VALUE, atol=0)
        for a, b in zip(gradients, results[0][2], strict=True):
            assert largest_error(a, b) <= FLOAT32_GRADIENT


def test_offsets_past_two_to_the_31(device):
    """The second image begins past it: one block of each image, against the same blocks side by side."""
    block, maps = 32, 3
    g = torch.Generator().manual_seed(0)
    u = torch.rand((maps, 2, block), generator=g).to(device, torch.bfloat16)
    d = 8 * torch.rand((2, block), generator=g).to(device)
    mask = (torch.rand((2, block), generator=g) < 0.8).to(device, torch.uint8)
    levels = torch.rand((maps, 2), generator=g).to(device)
    coefficients = torch.rand(number_of_rows(maps), generator=g).to(device)
    options = {"MAPS": maps, "RISING": True, "FAR": True, "HAS_MASK": True, "BLOCK": block, "num_warps": 1}

    def results(voxels):
        """Images `voxels` apart; the maps share storage, a block beside the other."""

        def apart(rows):
            storage = reserved(voxels + rows.shape[0] * 2 * block, rows.dtype, device)
            views = [storage[2 * block * i :] for i in range(len(rows))]
            for view, row in zip(views, rows, strict=True):
                view[:block], view[voxels : voxels + block] = row
            return tuple(views)

        inputs = (apart(u), levels, *apart(d[None]), *apart(mask[None]))
        partial = torch.full((2 * number_of_rows(maps), 2), math.nan, dtype=torch.float64, device=device)
        kernel.sums_kernel[(1, 2)](*inputs, partial, voxels, 1, 4.0, **options)
        grads = apart(torch.full_like(u, math.nan))
        up = torch.ones((), device=device)
        kernel.gradient_kernel[(1, 2)](
            *inputs, coefficients, up, grads, voxels, 4.0, CLEAN=1, CLEAN_RISES=True, **options
        )
        return partial, torch.stack([torch.stack((x[:block], x[voxels : voxels + block])) for x in grads])

    for far, near in zip(results(2**31 + 2 * maps * block), results(2 * maps * block), strict=True):
        assert bool(torch.isfinite(near).all())
        assert torch.equal(far, near)


def test_custom_ops_are_well_formed(device):
    maps, m, distance, mask, _ = case(SHAPES[1], device)
    rows = [u.flatten(1) for u in maps]
    levels = torch.cat((torch.zeros_like(m[:1]), m))
    given_ = (rows, levels, distance.flatten(1), mask.flatten(1))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(custom.noise_sums.op, (*given_, 4.0, True, True, "triton"), test_utils=checks)
    coefficients = torch.rand(number_of_rows(3), dtype=torch.float64, device=device)
    up = torch.ones((), device=device)
    for clean in (False, True):
        options = (*given_, coefficients, up, 4.0, True, True, clean, clean, "triton")
        torch.library.opcheck(custom.noise_gradient.op, options, test_utils=checks)


def test_full_graph(device):
    maps, m, distance, mask, points = case(SHAPES[1], device)
    traced = torch.compile(sk.noise_uncertainty_loss, fullgraph=True, backend="aot_eager")
    got, expected = (
        evaluate(function, maps, m, distance, mask=mask, points=points)
        for function in (traced, sk.noise_uncertainty_loss)
    )
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[2], expected[2], strict=True))
