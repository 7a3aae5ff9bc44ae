"""A sound kernel, and kernels broken on purpose, for the test of the compile check."""

from __future__ import annotations

import triton
import triton.language as tl

from sure_kernels.compile_check import Arguments, KernelCases


@triton.jit
def sound(p_in, p_out, stride, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    b = tl.load(p_in + start + o * tl.cast(stride, tl.int64))
    tl.store(p_out + start + o, b)


@triton.jit
def narrow_stride(p_in, p_out, stride, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.arange(0, BLOCK)
    b = tl.load(p_in + start + o * stride)
    tl.store(p_out + start + o, b)


@triton.jit
def narrow_block(p_in, p_out, stride, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_in + o)
    tl.store(p_out + o, b)


@triton.jit
def spilling(p_in, p_out, stride, BLOCK: tl.constexpr):
    """All values of a thread are needed again after the last has been loaded: with one warp, BLOCK / 32 of them."""
    o = tl.arange(0, BLOCK)
    b = tl.load(p_in + o)
    tl.store(p_out + o, b * tl.sum(b))


@triton.jit
def invalid(p_in, p_out, stride, BLOCK: tl.constexpr):
    tl.store(p_out + tl.arange(0, BLOCK + 1), 0.0)


def cases_of(kernel) -> list[KernelCases]:
    types = {"p_in": "*fp32", "p_out": "*fp32", "stride": "i32"}
    flags = {"block": (128, 256)}
    return [KernelCases(kernel, "toy", "forward", flags, lambda f: Arguments(types, {"BLOCK": f["block"]}))]


def compile_cases() -> list[KernelCases]:
    return cases_of(sound)
