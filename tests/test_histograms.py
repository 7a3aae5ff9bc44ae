"""The histograms: bins against their edges, the sweep against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compiled import as_python
from tolerances import FLOAT64_VALUE

import sure_kernels as sk
from sure_kernels import metrics
from sure_kernels.ops.histograms import closed_form, op, reference


def around(edges: torch.Tensor) -> torch.Tensor:
    """Each edge and its two neighbours in float64."""
    infinity = torch.tensor(float("inf"), dtype=torch.float64)
    return torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)])


def values(dtype: torch.dtype) -> torch.Tensor:
    generator = np.random.default_rng(0)
    drawn = [generator.random(5000), generator.beta(0.3, 40, 5000), 1 - generator.beta(0.3, 40, 5000)]
    special = [0.0, -0.0, 1.0, -1.0, 2.0, 1.0005, 5e-324, 1e-45, float("inf"), -float("inf")]
    edges = torch.cat([reference.magnitude_edges(), reference.thresholds()])
    return torch.cat([torch.from_numpy(np.concatenate([*drawn, special])), around(edges)]).to(dtype)


DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
class TestBins:
    def test_closed_form_is_the_search_for_edges(self, dtype):
        v = values(dtype)
        assert torch.equal(closed_form.magnitude_bin(v).long(), reference.magnitude_bin(v))
        assert torch.equal(closed_form.fine_bin(v).long(), reference.fine_bin(v))

    def test_values_lie_between_the_edges_of_their_bin(self, dtype):
        v = values(dtype).double()
        v = v[(v >= 0) & (v <= 1)]
        edges = reference.magnitude_edges()
        bins = reference.magnitude_bin(v)
        assert ((edges[bins] <= v) & (v <= edges[bins + 1])).all()
        assert len(edges) == 2 * reference.HALF + 1

    def test_bins_ascend(self, dtype):
        bins = closed_form.fine_bin(values(dtype).sort().values)
        assert (bins.diff() >= 0).all()
        assert int(bins[0]) == 0
        assert int(bins[-1]) == reference.BINS - 1

    def test_thresholds_cut_the_fine_bins(self, dtype):
        v = values(dtype)
        bins = closed_form.fine_bin(v)
        for t in reference.thresholds():
            above = v.double() > t
            assert int(bins[above].min()) > int(bins[~above].max())


def segmentation(shape, k, seed, dtype=torch.float32):
    """Probability, target and uncertainty, with ties and edges of bins among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (shape[0], k, *shape[1:]), generator=generator).to(dtype)
    uncertainty = torch.rand((shape[0], 1, *shape[1:]), generator=generator, dtype=torch.float64)
    rounded = (uncertainty * 100).round() / 100
    pick = torch.rand(uncertainty.shape, generator=generator) < 0.5
    return (
        logits.softmax(1),
        torch.randint(k, shape, generator=generator),
        torch.where(pick, rounded, uncertainty).to(dtype),
    )


def compare(found, expected):
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=FLOAT64_VALUE, atol=FLOAT64_VALUE, equal_nan=True, msg=name)


@settings(max_examples=30)
@given(
    st.sampled_from([(1, 1, 1), (2, 5, 7), (1, 3, 4, 5), (3, 17, 2)]),
    st.integers(2, 6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(["none", "ignored", "masked", "both", "everything"]),
    st.sampled_from([1, 7, 10]),
    st.tuples(*(st.booleans(),) * 4),
    st.integers(0, 10_000),
)
def test_sweep_is_its_definition(shape, k, dtype, left_out, num_bins, parts, seed):
    probability, target, uncertainty = segmentation(shape, k, seed, dtype)
    mask = None
    if left_out in ("ignored", "both"):
        target[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
    if left_out in ("masked", "both"):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    if left_out == "everything":
        mask = torch.zeros(shape, dtype=torch.bool)
    maps = uncertainty[:, 0] if seed % 3 else None
    before = [t.clone() for t in (probability, target, uncertainty)]
    args = (probability, target, mask, maps, -100, num_bins, *parts)
    expected = metrics.SegmentationHistograms(*op.segmentation_histograms(*args, "reference"))
    compare(metrics.SegmentationHistograms(*op.segmentation_histograms(*args, "eager")), expected)
    if dtype != torch.float64:
        with as_python():
            compare(metrics.SegmentationHistograms(*op.segmentation_histograms(*args, "compiled")), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (probability, target, uncertainty), strict=True))


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_any_layout(layout):
    probability, target, uncertainty = segmentation((2, 4, 5, 6), 3, 0)
    if layout == "channels last":
        args = probability.to(memory_format=torch.channels_last_3d), target.to(torch.int16), uncertainty
    elif layout == "transposed":
        args = tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (probability, target, uncertainty))
    else:
        probability, target, uncertainty = probability[:1].expand(2, -1, -1, -1, -1), target, uncertainty[:, :, :1]
        args = probability, target, uncertainty.expand(-1, -1, 4, -1, -1)
    compare(
        metrics.segmentation_histograms(*args),
        metrics.segmentation_histograms(*(x.contiguous() for x in args)),
    )


def test_pieces_join(monkeypatch):
    """A volume of many pieces, the last one shorter, is one of a single piece."""
    probability, target, uncertainty = segmentation((2, 9, 10, 11), 3, 4)
    whole = metrics.segmentation_histograms(probability, target, uncertainty)
    monkeypatch.setattr("sure_kernels.kernel_lib.chunks.SERIAL_ELEMENTS", 4 * 100)
    compare(metrics.segmentation_histograms(probability, target, uncertainty), whole)
    wrong = torch.stack([probability.argmax(1) == k for k in range(3)], 1)
    found = op.binary_histogram(uncertainty.flatten(1), wrong.flatten(2), None, "eager")
    expected = op.binary_histogram(uncertainty.flatten(1), wrong.flatten(2), None, "reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(
    st.integers(1, 40_000),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 10_000),
)
@settings(max_examples=20)
def test_binary_histogram_is_its_definition(v, classes, dtype, masked, seed):
    g = torch.Generator().manual_seed(seed)
    value = torch.rand((2, v), generator=g).to(dtype)
    value[torch.rand((2, v), generator=g) < 0.05] = torch.nan
    flag = torch.rand((2, classes, v), generator=g) < 0.3
    counted = torch.rand((2, v), generator=g) < 0.7 if masked else None
    expected = op.binary_histogram(value, flag, counted, "reference")
    found = op.binary_histogram(value, flag, counted, "eager")
    with as_python():
        compiled = op.binary_histogram(value, flag, counted, "compiled")
    for a, b, c in zip(found, compiled, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_labels_that_are_no_class(monkeypatch):
    """They count, and hit nothing; value checks refuse them where they run."""
    monkeypatch.setenv("SURE_KERNELS_CHECKS", "0")
    probability, target, uncertainty = segmentation((1, 9, 10), 3, 5)
    target[0, :2] = torch.tensor([3, -1]).repeat(5)
    args = (probability, target, None, uncertainty[:, 0], -100, 10, True, True, True, False)
    expected = metrics.SegmentationHistograms(*op.segmentation_histograms(*args, "reference"))
    with as_python():
        compare(metrics.SegmentationHistograms(*op.segmentation_histograms(*args, "compiled")), expected)


def test_order_of_voxels_does_not_matter():
    probability, target, uncertainty = segmentation((1, 6, 7), 3, 1)
    turned = [x.flip(-1, -2) for x in (probability, target, uncertainty)]
    compare(metrics.segmentation_histograms(*turned), metrics.segmentation_histograms(probability, target, uncertainty))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_nan_is_counted_and_left_out(backend):
    probability, target, uncertainty = segmentation((1, 5, 6), 3, 2)
    keep = torch.ones(1, 5, 6, dtype=torch.bool)
    keep[0, 0, :2] = False
    expected = metrics.segmentation_histograms(probability, target, uncertainty, mask=keep)
    broken = probability.clone()
    broken[0, 1, 0, :2] = torch.nan
    with sk.backend(backend):
        found = metrics.segmentation_histograms(broken, target, uncertainty)
        assert found.undefined.tolist() == [[2, 0]]
        compare(found._replace(undefined=expected.undefined), expected)
        uncertainty[0, 0, 1, 1] = torch.nan
        found = metrics.segmentation_histograms(broken, target, uncertainty)
        assert found.undefined.tolist() == [[2, 1]]
        assert int(found.errors[0, -1].sum()) == 27


def test_custom_ops_are_well_formed():
    probability, target, uncertainty = segmentation((2, 4, 5), 3, 3)
    checks = ("test_schema", "test_faketensor")
    for maps, mask in ((uncertainty[:, 0], None), (None, target > 0)):
        arguments = (probability, target, mask, maps, -100, 10, True, maps is None, maps is None, True, "eager")
        torch.library.opcheck(op.segmentation_histograms.op, arguments, test_utils=checks)
    flag = torch.rand(2, 3, 20) < 0.5
    torch.library.opcheck(op.binary_histogram.op, (uncertainty.flatten(1), flag, None, "eager"), test_utils=checks)
