"""`gradient_magnitude` in Triton against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from golden_cases import image_gradients
from kernel_cases import HALF_TOLERANCE, LAYOUTS, UPSTREAM, far_apart, laid_out, largest_error, with_gradient
from tolerances import FLOAT32_GRADIENT, FLOAT32_VALUE, GOLDEN_FILTERED

import sure_kernels as sk
from sure_kernels.kernel_lib.launch import march_length
from sure_kernels.kernel_lib.taps import CHANNEL_REDUCTIONS, OPERATORS, PADDING_MODES
from sure_kernels.ops.gradient_magnitude import kernel
from sure_kernels.ops.gradient_magnitude import op as custom

pytestmark = pytest.mark.usefixtures("triton_backend")

# Images, channels and odd sizes; axes of 1 and 2 are where padding is hardest.
SHAPES = ((1, 1, 5, 7), (2, 3, 4, 2), (1, 1, 1, 5), (1, 1, 4, 3, 5), (2, 1, 2, 5, 3), (1, 2, 2, 4, 2), (1, 1, 1, 1, 1))
SPACING = (0.7, 2.0, 1.3)


def image(shape, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def compare(x, kind="dense", tolerance=FLOAT32_GRADIENT, **options):
    """Value and gradient of `x` against the reference at the same values; returns what was found."""
    (got,), gradient = with_gradient(lambda t: (sk.gradient_magnitude(t, **options),), x, kind)
    (expected,), expected_gradient = with_gradient(
        lambda t: (sk.reference.gradient_magnitude(t, **options),), x.double(), kind
    )
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert gradient.dtype == x.dtype
    assert largest_error(got, expected) <= FLOAT32_VALUE
    assert largest_error(gradient, expected_gradient) <= tolerance
    return got, gradient


@pytest.mark.usefixtures("poisoned_memory")
class TestValues:
    # Shape, channel reduction and eps go round while operator and padding take every pair.
    @pytest.mark.parametrize(("operator", "padding_mode"), list(itertools.product(OPERATORS, PADDING_MODES)))
    @pytest.mark.parametrize("dims", [2, 3])
    def test_filters(self, operator, padding_mode, dims, device):
        turn = OPERATORS.index(operator) + PADDING_MODES.index(padding_mode)
        shapes = [s for s in SHAPES if len(s) == dims + 2]
        compare(
            image(shapes[turn % len(shapes)], device),
            operator=operator,
            padding_mode=padding_mode,
            channel_reduction=CHANNEL_REDUCTIONS[turn % 3],
            spacing=SPACING[:dims],
            eps=(0.0, 0.3)[turn % 2],
        )

    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, shape, device):
        compare(image(shape, device))

    @pytest.mark.parametrize("reduction", CHANNEL_REDUCTIONS)
    @pytest.mark.parametrize("shape", [(1, 3, 4, 5), (1, 2, 2, 3, 4)])
    def test_channels(self, reduction, shape, device):
        compare(image(shape, device), channel_reduction=reduction)

    def test_equal_channels(self, device):
        """The first of the largest takes the whole gradient."""
        x = image((1, 1, 4, 5), device).repeat(1, 3, 1, 1)
        _, gradient = compare(x, channel_reduction="max")
        assert int(gradient[:, 1:].count_nonzero()) == 0

    def test_more_than_one_program(self, device):
        """A plane of several blocks, and a march of several pieces."""
        assert kernel.BLOCK_ONE_CHANNEL < 17 * 19
        compare(image((1, 1, 17, 19), device), padding_mode="reflect")
        assert march_length(11 * 3, 11) < 11
        compare(image((1, 1, 11, 3, 1), device), padding_mode="extrapolate")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout, device):
        compare(laid_out(image((2, 2, 2, 3, 4), device), layout))

    @pytest.mark.parametrize("kind", UPSTREAM)
    @pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 1, 2, 3, 4)])
    def test_upstream_gradients(self, kind, shape, device):
        compare(image(shape, device), kind)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype, device):
        compare(image((1, 1, 4, 5, 3), device).to(dtype), tolerance=HALF_TOLERANCE[dtype])

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_scales(self, scale, device):
        compare(image((1, 1, 4, 5, 3), device) * scale)

    @pytest.mark.parametrize("reduction", CHANNEL_REDUCTIONS)
    def test_flat_images_have_no_gradient(self, reduction, device):
        for channels in (1, 2):
            x = torch.full((1, channels, 3, 4, 5), 3.0, device=device)
            (got,), gradient = with_gradient(
                lambda t: (sk.gradient_magnitude(t, channel_reduction=reduction),), x, "dense"
            )
            assert int(got.count_nonzero()) == 0
            assert int(gradient.count_nonzero()) == 0

    def test_runs_repeat_to_the_bit(self, device):
        x = image((1, 2, 2, 3, 4), device)
        first, second = (with_gradient(lambda t: (sk.gradient_magnitude(t),), x, "dense") for _ in range(2))
        assert torch.equal(first[0][0], second[0][0])
        assert torch.equal(first[1], second[1])

    def test_only_the_image_is_kept(self, device):
        x = image((1, 1, 3, 4, 5), device).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            saved: list[torch.Tensor] = []
            sk.gradient_magnitude(x)
        assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_published_image_gradients(golden, device):
    for x, expected, factor, options in image_gradients(golden("08_image_gradient")):
        got = factor * sk.gradient_magnitude(x.float().to(device), **options)
        assert largest_error(got, expected) < GOLDEN_FILTERED


def test_offsets_past_two_to_the_31(device):
    x = image((2, 2, 2, 3, 4), device).to(torch.bfloat16)
    far = far_apart(x)
    assert far.stride(0) > 2**31
    for got, expected in zip(
        with_gradient(lambda t: (sk.gradient_magnitude(t),), far, "dense"),
        with_gradient(lambda t: (sk.gradient_magnitude(t),), x, "dense"),
        strict=True,
    ):
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("shape", [(1, 2, 4, 5), (1, 1, 3, 4, 5)])
def test_custom_ops_are_well_formed(shape, device):
    x = image(shape, device)
    options = ("sobel", [1.0] * (len(shape) - 2), "replicate", "l2", 0.0, "triton")
    grad = torch.ones(1, 1, *shape[2:], device=device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(custom.gradient_magnitude_forward.op, (x, *options), test_utils=checks)
    torch.library.opcheck(custom.gradient_magnitude_backward.op, (grad, x, *options), test_utils=checks)


def test_full_graph(device):
    x = image((1, 1, 3, 4, 5), device)
    compiled = torch.compile(sk.gradient_magnitude, fullgraph=True, backend="aot_eager")
    eager = with_gradient(lambda t: (sk.gradient_magnitude(t),), x, "dense")
    traced = with_gradient(lambda t: (compiled(t),), x, "dense")
    assert torch.equal(eager[0][0], traced[0][0])
    assert torch.equal(eager[1], traced[1])


def test_double_is_refused(device):
    with pytest.raises(sk.BackendUnavailableError, match="the tensor is float64"):
        sk.gradient_magnitude(image((1, 1, 3, 4), device).double())
