"""The histograms in Triton against their definition."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LAYOUTS, far_apart, laid_out
from tolerances import FLOAT32_VALUE

import sure_kernels as sk
from sure_kernels import metrics
from sure_kernels.ops.histograms import kernel, op, reference

pytestmark = pytest.mark.usefixtures("triton_backend")


def segmentation(shape, k, device, seed=0, dtype=torch.float32):
    """Probability, target and uncertainty; some values on edges of bins, some targets ignored."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (shape[0], k, *shape[1:]), generator=g).float()
    u = torch.rand((shape[0], 1, *shape[1:]), generator=g)
    u = torch.where(torch.rand(u.shape, generator=g) < 0.5, (u * 100).round() / 100, u)
    target = torch.randint(k, shape, generator=g)
    target[torch.rand(shape, generator=g) < 0.2] = -100
    return logits.softmax(1).to(device, dtype), target.to(device), u.to(device, dtype)


def compare(args, **options):
    found = metrics.segmentation_histograms(*args, **options)
    expected = sk.reference.segmentation_histograms(*args, **options)
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        if b.dtype == torch.int64:
            assert torch.equal(a, b), name
        else:
            scale = max(float(b.abs().max()), 1.0)
            assert float((a - b).abs().max()) <= FLOAT32_VALUE * scale, name
    return found


@pytest.mark.usefixtures("poisoned_memory")
class TestSums:
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (1, 3, 11, 13)])
    @pytest.mark.parametrize("k", [2, 5])
    def test_shapes(self, shape, k, device):
        compare(segmentation(shape, k, device))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        compare(segmentation((1, 9, 17), 3, device, dtype=dtype))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, device):
        p, target, u = segmentation((2, 3, 5, 4), 3, device)
        compare((laid_out(p, layout), target, laid_out(u, layout)))

    @pytest.mark.parametrize("labels", [torch.uint8, torch.int8, torch.int16, torch.int32])
    def test_labels_and_mask(self, labels, device):
        p, target, u = segmentation((2, 6, 7), 3, device)
        target = torch.where(target < 0, 100, target).to(labels)
        mask = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.6
        compare((p, target, u), mask=mask.to(device), ignore_index=100)

    @pytest.mark.parametrize("num_bins", [1, 16, 40])
    def test_reliability_bins(self, num_bins, device):
        """On both sides of what a lane holds."""
        compare(segmentation((1, 9, 10), 3, device), num_bins=num_bins)

    @pytest.mark.parametrize("wanted", range(4))
    def test_parts(self, wanted, device):
        """One part alone, the magnitudes with classes or top label."""
        p, target, _ = segmentation((1, 5, 6), 3, device)
        parts = reference.Parts(*(i == wanted for i in range(4)))
        for chosen in (parts, parts._replace(magnitudes=True)):
            args = (p, target, None, None, -100, 10, *chosen)
            found, expected = (op.segmentation_histograms(*args, backend) for backend in ("triton", "reference"))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=FLOAT32_VALUE, atol=FLOAT32_VALUE)

    def test_nothing_counts(self, device):
        p, target, u = segmentation((1, 4, 5), 3, device)
        found = compare((p, target, u), mask=torch.zeros(1, 4, 5, dtype=torch.bool, device=device))
        assert not any(bool(t.any()) for t in found)

    def test_without_uncertainty(self, device):
        p, target, _ = segmentation((1, 4, 5), 3, device)
        compare((p, target))

    def test_many_programs_and_spans(self, device, monkeypatch):
        """More blocks than a span holds, and programs that end within one."""
        monkeypatch.setattr(kernel, "PROGRAMS", 3)
        monkeypatch.setattr(kernel, "SPAN", 2)
        compare(segmentation((1, 30, 47), 2, device))

    def test_nan(self, device):
        p, target, u = segmentation((2, 4, 5), 3, device)
        target.clamp_(min=0)
        p[0, 1, 0, :2] = torch.nan
        u[1, 0, 2, 3] = torch.nan
        found = metrics.segmentation_histograms(p, target, u)
        assert found.undefined.tolist() == [[2, 0], [0, 1]]
        assert int(found.errors[1, -1].sum()) == 19

    def test_given_errors(self, device):
        g = torch.Generator().manual_seed(2)
        u = torch.rand((2, 150), generator=g).to(device)
        u[1, :3] = torch.nan
        error = (torch.rand((2, 4, 150), generator=g) < 0.3).to(device)
        for mask in (None, torch.arange(150, device=device).expand(2, -1) % 7 > 1):
            found = op.binary_histogram(u, error, mask, "triton")
            assert all(
                torch.equal(a, b) for a, b in zip(found, reference.binary_histogram(u, error, mask), strict=True)
            )

    def test_runs_repeat_to_the_bit(self, device):
        args = segmentation((1, 20, 33), 3, device)
        first, second = (metrics.segmentation_histograms(*args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_metrics_run_on_it(device):
    p, target, u = segmentation((2, 12, 13), 4, device)
    found = metrics.calibration_error_detection(p, target, u)
    with sk.backend("eager"):
        expected = metrics.calibration_error_detection(p, target, u)
    torch.testing.assert_close(found, expected, rtol=FLOAT32_VALUE, atol=FLOAT32_VALUE, equal_nan=True)


def test_float64_is_refused(device):
    p, target, u = segmentation((1, 3, 4), 2, device)
    with pytest.raises(sk.BackendUnavailableError, match="float64"):
        metrics.segmentation_histograms(p, target, u.double())


def test_offsets_past_two_to_the_31(device):
    p, target, u = segmentation((2, 3, 4, 5), 3, device)
    found = metrics.segmentation_histograms(far_apart(p.bfloat16()), target, u)
    expected = metrics.segmentation_histograms(p.bfloat16(), target, u)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_custom_ops_are_well_formed(device):
    p, target, u = segmentation((2, 4, 5), 3, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        op.segmentation_histograms.op,
        (p, target, None, u[:, 0], -100, 10, *reference.Parts(), "triton"),
        test_utils=checks,
    )
    flag = torch.zeros(2, 3, 20, dtype=torch.bool, device=device)
    torch.library.opcheck(op.binary_histogram.op, (u.flatten(1), flag, None, "triton"), test_utils=checks)
