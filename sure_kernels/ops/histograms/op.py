"""Custom ops of the histograms, and their fakes; nothing here has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sure_kernels.kernel_lib.custom_op import custom_op
from sure_kernels.kernel_lib.inductor import serve
from sure_kernels.ops.histograms import closed_form, compiled, reference
from sure_kernels.ops.histograms.reference import BINS, HALF, Parts


def _serve(backend: str, name: str, *args: Any) -> Any:
    """The function `name` of the backend's module; the kernel's is imported only here, since triton may be absent."""
    if backend == "reference":
        return getattr(reference, name)(*args)
    if backend == "triton":
        from sure_kernels.ops.histograms import kernel

        return getattr(kernel, name)(*args)
    return serve(backend, getattr(compiled, name), getattr(closed_form, name), *args)


@custom_op("sure_kernels::binary_histogram")
def binary_histogram(value: Tensor, flag: Tensor, counted: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _serve(backend, "binary_histogram", value, flag, counted)


@binary_histogram.register_fake
def _(value, flag, counted, backend):
    counts = value.new_empty((*flag.shape[:2], 2, BINS), dtype=torch.int64)
    return counts, value.new_empty(value.shape[:1], dtype=torch.int64)


@custom_op("sure_kernels::segmentation_histograms")
def segmentation_histograms(
    probability: Tensor,
    target: Tensor,
    mask: Tensor | None,
    uncertainty: Tensor | None,
    ignore_index: int,
    num_bins: int,
    classes: bool,
    top: bool,
    magnitudes: bool,
    loss: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = Parts(classes, top, magnitudes, loss)
    maps = (probability, target, mask, uncertainty)
    return _serve(backend, "segmentation_histograms", *maps, ignore_index, num_bins, parts)


@segmentation_histograms.register_fake
def _(probability, target, mask, uncertainty, ignore_index, num_bins, classes, top, magnitudes, loss, backend):
    n, k = probability.shape[:2]

    def empty(*shape, dtype=torch.int64):
        return probability.new_empty((n, *shape), dtype=dtype)

    return (
        empty(k + 1, 3, num_bins, dtype=torch.float64),
        empty(k + 1, 2, 2 * HALF if magnitudes else 0),
        empty(k + 1, 2, 0 if uncertainty is None else BINS),
        empty(3, k, dtype=torch.float64),
        empty(2),
    )
