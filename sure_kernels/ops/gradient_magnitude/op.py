"""Custom ops, their fakes and the autograd Function of `gradient_magnitude`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.kernel_lib.inductor import serve
from sure_kernels.ops.gradient_magnitude import closed_form, compiled


def magnitude(
    image: Tensor, operator: str, spacing: Sequence[float], mode: str, reduction: str, eps: float, backend: str
) -> Tensor:
    """`closed_form.forward`, by the backend; the kernel's module is imported only here, as triton may be absent."""
    options = (image, operator, tuple(spacing), mode, reduction, eps)
    if backend == "triton":
        from sure_kernels.ops.gradient_magnitude import kernel

        return kernel.forward(*options)
    return serve(backend, compiled.forward, closed_form.forward, *options)


@custom_op("sure_kernels::gradient_magnitude")
def gradient_magnitude_forward(
    image: Tensor,
    operator: str,
    spacing: Sequence[float],
    padding_mode: str,
    channel_reduction: str,
    eps: float,
    backend: str,
) -> Tensor:
    return magnitude(image, operator, spacing, padding_mode, channel_reduction, eps, backend)


@gradient_magnitude_forward.register_fake
def _(image, operator, spacing, padding_mode, channel_reduction, eps, backend):
    n, _, *spatial = image.shape
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    return image.new_empty((n, 1, *spatial), dtype=dtype)


@custom_op("sure_kernels::gradient_magnitude_backward")
def gradient_magnitude_backward(
    grad: Tensor,
    image: Tensor,
    operator: str,
    spacing: Sequence[float],
    padding_mode: str,
    channel_reduction: str,
    eps: float,
    backend: str,
) -> Tensor:
    options = (grad, image, operator, tuple(spacing), padding_mode, channel_reduction, eps)
    if backend == "triton":
        from sure_kernels.ops.gradient_magnitude import kernel

        return kernel.backward(*options)
    return serve(backend, compiled.backward, closed_form.backward, *options)


@gradient_magnitude_backward.register_fake
def _(grad, image, operator, spacing, padding_mode, channel_reduction, eps, backend):
    return torch.empty_like(image, memory_format=torch.contiguous_format)


class GradientMagnitudeFunction(torch.autograd.Function):
    """Keeps the image alone; backward filters it again."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(image)
        ctx.options = options
        return gradient_magnitude_forward(image, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (image,) = ctx.saved_tensors
        return gradient_magnitude_backward(grad, image, *ctx.options), *(None,) * len(ctx.options)
