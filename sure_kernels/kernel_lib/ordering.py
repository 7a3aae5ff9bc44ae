"""Integers in place of floats where only their order counts: torch sorts those on a CPU ten times faster."""

from __future__ import annotations

import torch
from torch import Tensor

from sure_kernels.kernel_lib.chunks import working_dtype

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def order_bits(x: Tensor) -> Tensor:
    """Integers of 32 bits (64 for float64) that order, and tie, as the numbers x do; NaN goes anywhere."""
    x = x.to(working_dtype(x.dtype)) + 0.0  # + 0.0: -0.0 and 0.0 are one value
    bits = x.view(_INTEGER[x.dtype])
    limits = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (limits.bits - 1)) & limits.max)
