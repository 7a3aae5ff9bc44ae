"""Image gradients against NumPy and SciPy, and their invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evidential import LAYOUTS, relaid

import sure_kernels as sk
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES

NAMESPACES = [sk, sk.reference]
IDS = ["eager", "reference"]


@st.composite
def images(draw):
    """An image in float64 and the options of its gradient."""
    dims = draw(st.integers(2, 3))
    shape = draw(st.tuples(*(st.integers(1, 7),) * dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    image = torch.randn((draw(st.integers(1, 2)), draw(st.integers(1, 3)), *shape), generator=generator)
    if draw(st.booleans()):
        image = image.round()  # flat patches and equal channels
    options = {
        "operator": draw(st.sampled_from(OPERATORS)),
        "padding_mode": draw(st.sampled_from(PADDING_MODES)),
        "channel_reduction": draw(st.sampled_from(CHANNEL_REDUCTIONS)),
        "eps": draw(st.sampled_from([0.0, 0.1])),
        "spacing": tuple(draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(dims)),
    }
    return image.double(), options


@given(images())
def test_closed_form_is_the_reference(case):
    image, options = case
    results = []
    for namespace, dtype in ((sk.reference, torch.float64), (sk, torch.float64), (sk, torch.float32)):
        leaf = image.to(dtype, copy=True).requires_grad_()
        out = namespace.gradient_magnitude(leaf, **options)
        assert out.shape == (image.shape[0], 1, *image.shape[2:])
        assert out.dtype == dtype
        weight = torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), leaf)
        assert bool(torch.isfinite(gradient).all())
        results.append((out.detach().double(), gradient.double()))
    (value, gradient), *others = results
    for (got, got_gradient), tolerance in zip(others, (1e-11, 3e-6), strict=True):
        assert float((got - value).abs().max()) <= tolerance * max(1.0, float(value.max()))
        # A magnitude of rounding noise has a direction of its own, in float32 another one.
        if tolerance < 1e-6 or float(value[value > 0].min() if bool((value > 0).any()) else 1.0) > 1e-3:
            limit = 30 * tolerance * max(1.0, float(gradient.abs().max()))
            assert float((got_gradient - gradient).abs().max()) <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", PADDING_MODES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 3, 4, 5, 6)])
def test_layouts(layout, padding, shape):
    """Image and upstream gradient in any memory layout: the same bits."""
    g = torch.Generator().manual_seed(0)
    image, upstream = torch.randn(shape, generator=g), torch.randn((2, 1, *shape[2:]), generator=g)
    if layout == "expanded":
        image, upstream = (x[..., :1].expand_as(x).contiguous() for x in (image, upstream))
    results = []
    for x, up in ((image, upstream), (relaid(image, layout), relaid(upstream, layout))):
        leaf = x.detach().requires_grad_()
        out = sk.gradient_magnitude(leaf, padding_mode=padding)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, up)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_ramp_gives_its_slope(namespace, operator, dims):
    spacing = (0.5, 2.0, 1.25)[:dims]
    axes = torch.meshgrid(*(torch.arange(6) * s for s in spacing), indexing="ij")
    slopes = (3.0, -1.0, 2.0)[:dims]
    image = sum(a * s for a, s in zip(axes, slopes, strict=True))[None, None].double()
    got = namespace.gradient_magnitude(image, operator=operator, spacing=spacing)
    inside = got[(0, 0, *(slice(1, -1),) * dims)]
    torch.testing.assert_close(inside, torch.full_like(inside, math.hypot(*slopes)))
    everywhere = namespace.gradient_magnitude(image, operator=operator, spacing=spacing, padding_mode="extrapolate")
    torch.testing.assert_close(everywhere, torch.full_like(everywhere, math.hypot(*slopes)))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_sobel_is_scipys(namespace):
    image = np.random.default_rng(0).normal(size=(9, 8, 7))
    for mode, scipy_mode in (("replicate", "reflect"), ("reflect", "mirror"), ("zeros", "constant")):
        want = np.sqrt(sum((ndi.sobel(image, axis, mode=scipy_mode) / 32) ** 2 for axis in range(3)))
        got = namespace.gradient_magnitude(torch.from_numpy(image)[None, None], padding_mode=mode)
        np.testing.assert_allclose(got[0, 0].numpy(), want, atol=1e-12)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
def test_central_with_extrapolation_is_numpys(namespace):
    image = np.random.default_rng(0).normal(size=(5, 8, 7))
    spacing = (2.0, 0.5, 1.5)
    want = np.sqrt(sum(g**2 for g in np.gradient(image, *spacing)))
    got = namespace.gradient_magnitude(
        torch.from_numpy(image)[None, None], operator="central", padding_mode="extrapolate", spacing=spacing
    )
    np.testing.assert_allclose(got[0, 0].numpy(), want, atol=1e-12)


@given(images(), st.integers(0, 2))
def test_mirroring_and_scaling(case, axis):
    image, options = case
    axis = 2 + axis % (image.ndim - 2)
    value = sk.gradient_magnitude(image, **options)
    torch.testing.assert_close(sk.gradient_magnitude(image.flip(axis), **options), value.flip(axis))
    doubled = options | {"spacing": tuple(2 * s for s in options["spacing"]), "eps": options["eps"] / 2}
    torch.testing.assert_close(2 * sk.gradient_magnitude(image, **doubled), value)


def test_flat_images_have_zero_gradient():
    image = torch.full((1, 2, 4, 5), 7.0, requires_grad=True)
    for reduction in CHANNEL_REDUCTIONS:
        (gradient,) = torch.autograd.grad(sk.gradient_magnitude(image, channel_reduction=reduction).sum(), image)
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("namespace", NAMESPACES, ids=IDS)
@pytest.mark.parametrize("reduction", CHANNEL_REDUCTIONS)
def test_nan_spreads_to_its_neighbours(namespace, reduction):
    image = torch.rand((1, 2, 5, 5, 5))
    image[0, 1, 2, 2, 2] = math.nan
    got = namespace.gradient_magnitude(image, channel_reduction=reduction).isnan()[0, 0]
    expected = torch.zeros((5, 5, 5), dtype=torch.bool)
    expected[1:4, 1:4, 1:4] = True
    expected[2, 2, 2] = False  # differences along an axis do not read their centre
    assert torch.equal(got, expected)
