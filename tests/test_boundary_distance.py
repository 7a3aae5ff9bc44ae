"""Boundary distances and bands against SciPy and scikit-image, in every dtype of labels, and their invariants."""

from __future__ import annotations

import contextlib
import math
import time

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.segmentation import find_boundaries
from tolerances import FLOAT32_VALUE

import sure_kernels as sk
from sure_kernels.ops.boundary_distance import closed_form, codes
from sure_kernels.ops.boundary_distance import op as custom
from sure_kernels.registry import blobs

NAMESPACES = [sk, sk.reference]
IDS = ["eager", "reference"]
# Unit, isotropic, whole multiples of a unit, of none.
SPACINGS = ((1.0, 1.0, 1.0), (0.7, 0.7, 0.7), (2.5, 1.0, 1.0), (1.5, 0.7, 2.0), (1.0, 1.2345, 0.777))
KINDS = ("random", "sparse", "regions", "empty", "full", "one voxel", "half")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def published(label: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """What the published program computes, a class at a time; but +inf without a boundary, where it invents one."""
    boundary = np.zeros(label.shape, bool)
    for c in np.unique(label[label > 0]):
        boundary |= find_boundaries(label == c, connectivity=label.ndim, mode="thick")
    if not boundary.any():
        return np.full(label.shape, np.inf)
    return ndi.distance_transform_edt(~boundary, sampling=spacing)


def labels_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """int64 labels 0 to 3 of (N, *spatial)."""
    random = torch.randint(0, 4, shape, generator=generator)
    if kind == "random":
        return random
    if kind == "sparse":
        return random * (torch.rand(shape, generator=generator) < 0.05)
    if kind == "regions":
        for axis, n in enumerate(shape[1:], 1):
            random = random.repeat_interleave(4, axis).narrow(axis, 0, n)
        return random
    labels = torch.full(shape, 2 if kind == "full" else 0)
    if kind == "one voxel":
        labels.view(-1)[int(torch.randint(0, labels.numel(), (), generator=generator))] = 3
    if kind == "half":
        labels.narrow(-1, 0, (shape[-1] + 1) // 2).fill_(1)
    return labels


@st.composite
def label_maps(draw, longest=9):
    """Labels and the spacing of their axes."""
    spatial = draw(st.lists(st.integers(1, longest), min_size=2, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = labels_of(draw(st.sampled_from(KINDS)), (draw(st.integers(1, 2)), *spatial), generator)
    return labels, draw(st.sampled_from(SPACINGS))[: len(spatial)]


@contextlib.contextmanager
def small_pieces(search: bool):
    """Pieces of a few voxels; with `search` no integers and no windows, as where one has to look far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_form, "_CPU_PIECE", 20)
        patch.setattr(closed_form, "_BLOCK", 2)
        patch.setattr(closed_form, "_LINES", 5)
        if search:
            patch.setattr(codes, "_LONGEST_WINDOW", -1)
            patch.setattr(closed_form, "_LONGEST_FLOAT_WINDOW", -1)
        codes.choose_codes.cache_clear()
        yield
    codes.choose_codes.cache_clear()


def check(labels, spacing, namespace=sk, distances=(None, 0.0, 1.6, 2.0, 4.0)):
    """Full and truncated distances and a band against the published program's."""
    dims = labels.ndim - 1
    expected = torch.stack([torch.from_numpy(published(row.numpy(), spacing)) for row in labels])[:, None]
    for most in distances:
        got = namespace.boundary_distance(labels, max_distance=most, spacing=spacing)
        assert got.dtype == torch.float32
        within = expected if most is None else torch.where(expected <= most * (1 + 1e-6), expected, math.inf)
        torch.testing.assert_close(got, within.float(), rtol=FLOAT32_VALUE, atol=0)
    band = namespace.boundary_band(labels, boundary=1.0, near=2.0, far=3.5, spacing=spacing, spatial_dims=dims)
    assert band.dtype == torch.uint8
    steps = torch.tensor([1.0, 2.0, 3.5]).double() * (1 + 1e-6)
    of_interval = torch.tensor([2, 1, 0, 3], dtype=torch.uint8)
    assert torch.equal(band, of_interval[torch.bucketize(expected, steps)])


@given(label_maps())
def test_it_is_what_is_published(case):
    labels, spacing = case
    check(labels, spacing)
    check(labels, spacing, sk.reference)


@given(label_maps(), st.booleans())
def test_in_pieces(case, search):
    with small_pieces(search):
        check(*case)


@pytest.mark.parametrize("kind", ["sparse", "one voxel", "regions"])
@pytest.mark.parametrize("shape", [(1, 12, 70, 34), (2, 50, 90)])
def test_far_away(kind, shape):
    """Large enough that the full distance is searched, block by block."""
    labels = labels_of(kind, shape, torch.Generator().manual_seed(0))
    spacing = (1.0,) * (len(shape) - 1)
    chosen = codes.choose_codes(shape[1:], spacing, None)
    assert chosen.dtype == torch.float32
    assert max(chosen.steps) > closed_form._LONGEST_FLOAT_WINDOW
    check(labels, spacing, distances=(None, 4.0, 50.0))
    check(labels, (2.0, 0.8, 1.1)[: len(spacing)], distances=(None, 20.0))


def test_integers_hold_what_the_losses_ask_for():
    """Bytes for the published distance of 4 voxels, two of them where spacing differs by simple ratios."""
    for spacing, most, dtype in (
        ((1.0, 1.0, 1.0), 4.0, torch.uint8),
        ((0.7, 0.7, 0.7), 2.8, torch.uint8),
        ((3.0, 1.5, 1.5), 6.0, torch.uint8),
        ((1.5, 0.7, 2.0), 4.0, torch.int16),
        ((np.float32(2.5).item(), np.float32(0.9375).item(), np.float32(0.9375).item()), 4.0, torch.int16),
        ((1.0, 1.0, 1.0), 20.0, torch.int16),
        ((1.0, 1.2345, 0.777), 4.0, torch.float32),
        ((1.0, 1.0, 1.0), None, torch.float32),
    ):
        chosen = codes.choose_codes((128,) * 3, spacing, most)
        assert chosen.dtype == dtype, (spacing, most)
        for cost, step in zip(chosen.costs, spacing, strict=True):
            assert math.isclose(cost * chosen.unit, step * step, rel_tol=1e-7)
        # A sum of two codes must not wrap around.
        assert dtype == torch.float32 or chosen.none + chosen.limit <= torch.iinfo(dtype).max


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_every_dtype(namespace, dtype):
    labels = labels_of("regions", (2, 9, 10), torch.Generator().manual_seed(1))
    expected = namespace.boundary_distance(labels)
    assert torch.equal(namespace.boundary_distance(labels.to(dtype)), expected)
    # Names of classes mean nothing: take the largest there are, beside those that differ in one byte from them.
    largest = torch.iinfo(dtype).max
    names = [0, largest, largest - 1, largest ^ 0x40 if dtype.itemsize == 1 else largest ^ 0x100]
    named = torch.from_numpy(np.array(names, str(dtype).removeprefix("torch."))[labels.numpy()])
    assert torch.equal(namespace.boundary_distance(named), expected)
    # An index that the dtype cannot hold ignores nothing, neither by its low bits nor by its sign.
    for index in (-100, -1, largest + 1, names[1] - 2 * (largest + 1)):
        if not torch.iinfo(dtype).min <= index <= largest and -(2**63) <= index < 2**63:
            assert torch.equal(namespace.boundary_distance(named, ignore_index=index), expected)
    if largest < 2**63:
        ignored = torch.where(labels == 1, -100, labels)
        got = namespace.boundary_distance(named, ignore_index=largest)
        assert torch.equal(got, namespace.boundary_distance(ignored))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_labels_of_two_kinds(namespace):
    labels = labels_of("regions", (1, 9, 10), torch.Generator().manual_seed(1))
    above = (labels > 1).long()
    assert torch.equal(namespace.boundary_distance(labels > 1), namespace.boundary_distance(above))
    # Below 1 all is background.
    both = torch.where(labels > 1, 1, -labels)
    assert torch.equal(namespace.boundary_distance(both), namespace.boundary_distance(above))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_many_classes_in_one_pass(namespace):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 400, (1, 3, 4, 3), generator=generator)
    for axis in (1, 2, 3):
        labels = labels.repeat_interleave(4, axis)
    check(labels, (1.0, 1.0, 1.0), namespace, distances=(4.0,))


def without_ignored(label: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Boundary voxels by SciPy's rank filters, ignored voxels replaced by what neither filter picks."""
    low = ndi.minimum_filter(np.where(ignored, 999, label), 3, mode="constant", cval=999)
    high = ndi.maximum_filter(np.where(ignored, -999, label), 3, mode="constant", cval=-999)
    return (high > low) & ~ignored


@given(label_maps(), st.sampled_from([-100, 1, 255]), st.booleans())
def test_ignored_voxels_make_no_boundary(case, ignore_index, pieces):
    labels, spacing = case
    generator = torch.Generator().manual_seed(labels.numel())
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, ignore_index)
    for row in labels[:1]:
        boundary = without_ignored(row.numpy(), row.numpy() == ignore_index)
        expected = np.full(row.shape, np.inf)
        if boundary.any():
            expected = ndi.distance_transform_edt(~boundary, sampling=spacing)
    with small_pieces(False) if pieces else contextlib.nullcontext():
        for namespace in NAMESPACES:
            got = namespace.boundary_distance(labels, spacing=spacing, ignore_index=ignore_index)
            np.testing.assert_allclose(got[0, 0].numpy(), expected, rtol=FLOAT32_VALUE)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_classes_that_never_touch(namespace):
    labels = torch.zeros((2, 5, 9), dtype=torch.int64)
    labels[0, :, 4:] = -100  # nothing but background and ignored voxels
    labels[1, :, 4] = -100
    labels[1, :, 5:] = 2
    assert bool(torch.isinf(namespace.boundary_distance(labels)).all())
    assert bool((namespace.boundary_band(labels) == 3).all())
    labels[1, 2, 4] = 2
    distance = namespace.boundary_distance(labels)[1, 0]
    assert float(distance[2, 3]) == 0
    assert float(distance[2, 4]) == 0


@given(label_maps(), st.integers(0, 2))
def test_mirroring_scaling_and_renaming(case, axis):
    labels, spacing = case
    axis = 1 + axis % (labels.ndim - 1)
    distance = sk.boundary_distance(labels, spacing=spacing, max_distance=3.0)
    mirrored = sk.boundary_distance(labels.flip(axis), spacing=spacing, max_distance=3.0)
    assert torch.equal(mirrored, distance.flip(axis + 1))
    doubled = sk.boundary_distance(labels, spacing=tuple(2 * s for s in spacing), max_distance=6.0)
    assert torch.equal(doubled, 2 * distance)
    renamed = torch.tensor([0, 7, 300, 2])[labels]
    assert torch.equal(sk.boundary_distance(renamed, spacing=spacing, max_distance=3.0), distance)
    transposed = sk.boundary_distance(labels.transpose(1, -1), spacing=spacing[::-1], max_distance=3.0)
    torch.testing.assert_close(transposed, distance.transpose(2, -1), rtol=FLOAT32_VALUE, atol=0)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_a_distance_equal_to_the_threshold_is_within(namespace):
    """Whatever the rounding of spacing and threshold."""
    labels = torch.zeros((1, 3, 40), dtype=torch.uint8)
    labels[:, :, 20:] = 1
    for step in (0.1, 0.3, 0.7, 1.1, 1 / 3):
        for voxels in range(1, 15):
            most = step * voxels
            got = namespace.boundary_distance(labels, max_distance=most, spacing=(1.0, step))
            assert int(torch.isfinite(got[0, 0, 0]).sum()) == 2 + 2 * voxels
            band = namespace.boundary_band(labels, boundary=0.0, near=most, far=most, spacing=(1.0, step))
            assert int((band[0, 0, 0] == 1).sum()) == 2 * voxels
            assert int((band == 0).sum()) == 0


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_extreme_thresholds(namespace):
    labels = labels_of("sparse", (1, 12, 13), torch.Generator().manual_seed(0))
    full = namespace.boundary_distance(labels)
    for most in (math.inf, 1e200, 1e30):
        assert torch.equal(namespace.boundary_distance(labels, max_distance=most), full)
    assert torch.equal(namespace.boundary_distance(labels, max_distance=0.0) == 0, full == 0)
    band = namespace.boundary_band(labels, boundary=0.0, near=0.0, far=1e200)
    assert torch.equal(band == 2, full == 0)
    assert torch.equal(band == 0, full > 0)
    band = namespace.boundary_band(labels, boundary=1e200, near=1e200, far=1e200)
    assert bool((band == 2).all())
    for spacing in ((1e-30, 1e-30), (1e-25, 1.37e-25), (1e30, 1.37e30)):
        got = namespace.boundary_distance(labels, spacing=spacing)
        expected = published(labels[0].numpy(), spacing)
        np.testing.assert_allclose(got[0, 0].numpy(), expected, rtol=FLOAT32_VALUE)


def test_channel_axis():
    labels = torch.randint(0, 3, (2, 1, 6, 7))
    a = sk.boundary_distance(labels, spatial_dims=2)
    assert torch.equal(a, sk.boundary_distance(labels[:, 0]))
    assert torch.equal(a, sk.boundary_distance(labels, spacing=(1.0, 1.0)))
    # Without a word on it, every dimension after the first is spatial.
    assert sk.boundary_distance(labels).shape == (2, 1, 1, 6, 7)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout):
    labels = labels_of("regions", (2, 5, 6, 7), torch.Generator().manual_seed(0))
    laid_out = {
        "transposed": labels.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": torch.stack((labels, 3 - labels), -1).flatten(-2)[..., ::2],
        "expanded": labels[:1].expand(2, -1, -1, -1),
    }[layout]
    assert torch.equal(sk.boundary_distance(laid_out), sk.boundary_distance(laid_out.contiguous()))


def test_full_graph_and_custom_ops():
    labels = labels_of("regions", (1, 7, 8, 9), torch.Generator().manual_seed(0))

    def both(x):
        return sk.boundary_distance(x, max_distance=4.0), sk.boundary_band(x)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(labels), both(labels), strict=True):
        assert torch.equal(got, expected)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    spacing = [1.0, 1.0, 1.0]
    torch.library.opcheck(custom.boundary_distance.op, (labels, 4.0, spacing, -100, "eager"), test_utils=checks)
    torch.library.opcheck(custom.boundary_band.op, (labels, 1.0, 4.0, 4.0, spacing, -100, "eager"), test_utils=checks)


@pytest.mark.slow
def test_five_times_as_fast_as_published():
    """At 128^3 with 4 classes, up to 4 voxels: processor time on one thread, which other work leaves alone."""
    labels = blobs(torch.Generator().manual_seed(0), 4, (128,) * 3)

    def fastest(function):
        times = []
        for _ in range(5):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = fastest(lambda: sk.boundary_distance(labels, max_distance=4.0))
        theirs = fastest(lambda: published(labels[0].numpy(), (1.0, 1.0, 1.0)))
    finally:
        torch.set_num_threads(threads)
    assert 5 * ours < theirs
