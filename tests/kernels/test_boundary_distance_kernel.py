"""`boundary_distance` and `boundary_band` in Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import far_apart
from tolerances import FLOAT32_VALUE

import sure_kernels as sk
from sure_kernels.kernel_lib.launch import march_length
from sure_kernels.ops.boundary_distance import codes, kernel
from sure_kernels.ops.boundary_distance import op as custom

pytestmark = pytest.mark.usefixtures("triton_backend")

# Odd sizes, and axes of 1 and 2.
SHAPES = ((1, 5, 7), (2, 1, 9), (1, 6, 1), (1, 1, 1), (1, 4, 3, 5), (2, 2, 5, 3), (1, 1, 1, 5), (1, 3, 1, 1))
# Bytes, two bytes, float32.
SPACINGS = ((1.0, 1.0, 1.0), (1.5, 0.7, 2.0), (1.0, 1.2345, 0.777))
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def labels(shape, device, share=0.3, seed=0):
    """Labels 0 to 3, that share of them foreground."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(1, 4, shape, generator=g) * (torch.rand(shape, generator=g) < share)).to(device)


def compare(x, spacing=SPACINGS[0], distances=(None, 2.0), **options):
    """Full and truncated distances and a band of `x` against the reference."""
    options |= {"spacing": spacing[: x.ndim - 1]}
    for most in distances:
        got = sk.boundary_distance(x, max_distance=most, **options)
        expected = sk.reference.boundary_distance(x, max_distance=most, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=FLOAT32_VALUE, atol=0)
    thresholds = {"boundary": 1.0, "near": 1.5, "far": 2.5}
    got = sk.boundary_band(x, **thresholds, **options)
    assert got.dtype == torch.uint8
    assert torch.equal(got, sk.reference.boundary_band(x, **thresholds, **options))


@pytest.mark.usefixtures("poisoned_memory")
class TestValues:
    # Spacings, and with them the codes, go round.
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape, device):
        compare(labels(shape, device), SPACINGS[SHAPES.index(shape) % 3])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
    def test_codes(self, dtype, device):
        spacing = SPACINGS[(torch.uint8, torch.int16, torch.float32).index(dtype)]
        shape = (1, 3, 4, 20)
        assert codes.choose_codes(shape[1:], spacing, 4.0).dtype == dtype
        compare(labels(shape, device, 0.02), spacing, (None, 0.0, 4.0))

    @pytest.mark.parametrize("value", [0, 2])
    def test_no_boundary(self, value, device):
        x = torch.full((1, 3, 4, 5), value, device=device)
        compare(x)
        assert bool(torch.isinf(sk.boundary_distance(x)).all())

    def test_far_away(self, device):
        """More steps than go unlooked at, whatever the axis, and labels that are near for some blocks alone."""
        for shape, spacing in (((1, 20, 2, 3), SPACINGS[0]), ((1, 2, 20, 3), SPACINGS[2]), ((1, 12, 20), SPACINGS[1])):
            x = torch.zeros(shape, dtype=torch.uint8, device=device)
            x.view(-1)[-2] = 1
            assert max(codes.choose_codes(shape[1:], spacing[: len(shape) - 1], None).steps) > kernel._UNCHECKED
            compare(x, spacing, distances=(None, 11.0))

    def test_more_than_one_program(self, device, monkeypatch):
        """A plane of several blocks, a march of several pieces, several tiles of rows, rows of several blocks."""
        if device == "cpu":
            monkeypatch.setattr(kernel, "_SCAN_TILE", 32)  # the interpreter scans element by element
        assert kernel.BLOCK_BOUNDARY < 17 * 19
        compare(labels((1, 17, 19), device), distances=(2.0,))
        assert march_length(11 * 3 * 3, 11) < 11
        compare(labels((1, 11, 3, 3), device), distances=(2.0,))
        compare(labels((1, kernel._SCAN_TILE // 4 + 3, 3), device), distances=(2.0,))
        assert kernel._tile(13 * 10) == ("row", 256, 1)
        compare(labels((1, 3, 13, 10), device, 0.01), distances=(3.0,))
        assert kernel._tile(41 * 27) == ("row", 128, 1)
        compare(labels((1, 2, 41, 27), device, 0.01), distances=(3.0,))

    def test_rows_too_long_to_scan(self, device, monkeypatch):
        monkeypatch.setattr(kernel, "_LONGEST_SCAN", 4)
        for spacing in SPACINGS:
            compare(labels((2, 5, 7), device, 0.02), spacing, (3.0,))
        compare(labels((1, 2, 600), device, 0.02), distances=(3.0,))
        compare(labels((1, 2, 20), device, 0.05), SPACINGS[2], (None,))

    @pytest.mark.parametrize("dtype", INTEGERS, ids=str)
    def test_labels_of_every_dtype(self, dtype, device):
        x = labels((1, 3, 4, 5), device)
        expected = sk.boundary_distance(x)
        assert torch.equal(sk.boundary_distance(x.to(dtype)), expected)
        largest = torch.iinfo(dtype).max
        names = torch.tensor([0, -1, -2, -3] if dtype == torch.uint64 else [0, largest, largest - 1, largest - 2])
        named = names.to(device)[x].to(dtype) if dtype != torch.uint64 else names.to(device)[x].view(dtype)
        assert torch.equal(sk.boundary_distance(named, ignore_index=-1), expected)
        ignore_index = largest - 1 if dtype != torch.uint64 else 0
        hidden = x.masked_fill(x == (2 if ignore_index else 0), -100)
        expected = sk.reference.boundary_distance(hidden)
        got = sk.boundary_distance(named, ignore_index=ignore_index)
        torch.testing.assert_close(got, expected, rtol=FLOAT32_VALUE, atol=0)

    def test_labels_below_one_are_background(self, device):
        x = labels((1, 5, 6), device)
        negative = torch.where(x > 1, 1, -x)
        assert torch.equal(sk.boundary_distance(negative), sk.boundary_distance(x > 1))

    @pytest.mark.parametrize("ignore_index", [-100, 0, 1, 255])
    @pytest.mark.parametrize("shape", [(1, 6, 7), (2, 3, 4, 5)])
    def test_ignored_voxels(self, shape, ignore_index, device):
        x = labels(shape, device)
        ignored = labels(shape, device, 0.3, seed=1) > 0
        compare(x.masked_fill(ignored, ignore_index), ignore_index=ignore_index)

    @pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
    def test_layouts(self, layout, device):
        x = labels((2, 3, 4, 5), device)
        laid_out = {
            "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
            "strided": torch.stack((x, 3 - x), -1).flatten(-2)[..., ::2],
            "expanded": x[:1].expand(2, -1, -1, -1),
        }[layout]
        assert not laid_out.is_contiguous()
        compare(laid_out)

    def test_runs_repeat_to_the_bit(self, device):
        x = labels((2, 3, 4, 5), device)
        first, second = (sk.boundary_distance(x, spacing=SPACINGS[2]) for _ in range(2))
        assert torch.equal(first, second)


def test_offsets_past_two_to_the_31(device):
    x = labels((2, 2, 3, 4), device).to(torch.uint8)
    far = far_apart(x)
    assert min(far.stride()[:2]) > 2**31
    assert torch.equal(sk.boundary_distance(far), sk.boundary_distance(x))


def test_distance_equal_to_the_threshold_is_within(device):
    x = torch.zeros((1, 1, 20), dtype=torch.uint8, device=device)
    x[..., 10:] = 1
    for step in (0.1, 0.7, 1 / 3):
        got = sk.boundary_distance(x, max_distance=step * 6, spacing=(1.0, step))
        assert int(torch.isfinite(got).sum()) == 14
        assert math.isclose(float(got[torch.isfinite(got)].max()), step * 6, rel_tol=FLOAT32_VALUE)


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 3, 4, 5)])
def test_custom_ops_are_well_formed(shape, device):
    x = labels(shape, device)
    spacing = [1.0] * (len(shape) - 1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(custom.boundary_distance.op, (x, 4.0, spacing, -100, "triton"), test_utils=checks)
    torch.library.opcheck(custom.boundary_band.op, (x, 1.0, 4.0, 4.0, spacing, -100, "triton"), test_utils=checks)


def test_full_graph(device):
    x = labels((1, 3, 4, 5), device)

    def both(t):
        return sk.boundary_distance(t, max_distance=2.0), sk.boundary_band(t)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), both(x), strict=True):
        assert torch.equal(got, expected)
