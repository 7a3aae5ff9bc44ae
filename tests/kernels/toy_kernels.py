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
    """In 64 bits only where the stride has them already."""
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
def narrow_in_mask(p_in, p_out, stride, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < stride
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_in + o, mask=m, other=0.0), mask=m)


@triton.jit
def narrow_in_loop(p_in, p_out, stride, BLOCK: tl.constexpr):
    """The product is carried from turn to turn, and read after the loop."""
    o = tl.arange(0, BLOCK)
    for i in range(0, stride):
        o = o + i * stride
    tl.store(p_out + o.to(tl.int64), tl.load(p_in + tl.arange(0, BLOCK)))


@triton.jit
def narrow_in_while(p_in, p_out, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    i = 0
    while i < stride:
        tl.store(p_out + o.to(tl.int64), tl.load(p_in + tl.arange(0, BLOCK)))
        o += stride * tl.program_id(0)
        i += 1


@triton.jit
def narrow_in_branch(p_in, p_out, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    if tl.load(p_in) > 0.0:
        tl.store(p_out + stride.to(tl.int64), 1.0)
        o += tl.program_id(0) * stride
    tl.store(p_out + o, tl.load(p_in + tl.arange(0, BLOCK)))


@triton.jit
def spilling(p_in, p_out, stride, BLOCK: tl.constexpr):
    """All values of a thread are needed again after the last has been loaded: with one warp, BLOCK / 32 of them."""
    o = tl.arange(0, BLOCK)
    b = tl.load(p_in + o)
    tl.store(p_out + o, b * tl.sum(b))


@triton.jit
def invalid(p_in, p_out, stride, BLOCK: tl.constexpr):
    tl.store(p_out + tl.arange(0, BLOCK + 1), 0.0)


def cases_of(kernel, num_warps=4, blocks=(128, 256)) -> list[KernelCases]:
    types = {"p_in": "*fp32", "p_out": "*fp32", "stride": "int"}
    flags = {"block": blocks}
    return [KernelCases(kernel, "toy", "forward", flags, lambda f: Arguments(types, {"BLOCK": f["block"]}, num_warps))]


def compile_cases() -> list[KernelCases]:
    return cases_of(sound)
