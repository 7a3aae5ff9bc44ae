"""The checks of memory and races that the interpreter runs every kernel under find what they are there for."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compute-sanitizer is there for compiled kernels"
)


@triton.jit
def _copy_kernel(p_in, p_out, size, shift_in, shift_out, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Program i copies BLOCK elements from shift_in + i STEP to shift_out + i STEP."""
    o = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    m = o < size
    tl.store(p_out + o + shift_out, tl.load(p_in + o + shift_in, mask=m), mask=m)


@triton.jit
def _copy_and_read_kernel(p_in, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_in + o))
    tl.store(p_out + BLOCK + o, tl.load(p_out + BLOCK - 1 - o))


def copy(source, target, *, size=8, shifts=(0, 0), step=4, programs=2):
    _copy_kernel[(programs,)](source, target, size, *shifts, STEP=step, BLOCK=4)


def volume(size: int, offset: int = 0) -> torch.Tensor:
    """A view in the middle of an allocation."""
    return torch.zeros(size + 16)[8 + offset : 8 + offset + size]


def test_what_is_allowed():
    copy(volume(8), volume(8))
    copy(volume(6), volume(6), size=6)
    x = volume(8)
    copy(x, x)
    copy(torch.zeros(1).expand(8), volume(8), size=1)
    copy(torch.zeros(15)[::2], volume(15), shifts=(7, 7))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shifts": (1, 0)}, "program 1, loads 1 elements outside its tensors"),
        ({"shifts": (-1, 0)}, "program 0, loads 1 elements outside its tensors"),
        ({"shifts": (0, 1)}, "program 1, stores 1 elements outside its tensors"),
        ({"shifts": (0, -2)}, "program 0, stores 2 elements outside its tensors"),
        ({"size": 9, "programs": 3}, "program 2, loads 1 elements outside its tensors"),
        ({"size": 6, "step": 2}, "program 1, writes where this launch has written"),
    ],
)
def test_faults_are_named(change, fault):
    with pytest.raises(Exception, match=f"_copy_kernel, {fault}"):
        copy(volume(8), volume(8), **change)


def test_races_in_place():
    x = volume(12)
    with pytest.raises(Exception, match="program 1, reads what this launch has written"):
        copy(x[:8], x[4:], step=4)
    with pytest.raises(Exception, match="program 1, writes what another program of the launch reads"):
        copy(x[4:], x[:8], step=4)
    with pytest.raises(Exception, match="_copy_and_read_kernel, program 0, reads what this launch has written"):
        _copy_and_read_kernel[(1,)](volume(4), volume(8), BLOCK=4)


def test_a_launch_after_a_fault_is_checked_anew():
    with pytest.raises(Exception, match="outside its tensors"):
        copy(volume(8), volume(8), shifts=(1, 0))
    copy(volume(8), volume(8))


def test_tensors_that_stride_far_are_held_to_their_bounds():
    """They are too large to follow who touched what; their memory is reserved, not used."""
    far = torch.empty(3 << 22, dtype=torch.float32)[:: (3 << 22) - 1]
    _copy_kernel[(1,)](far, volume(8), 1, (3 << 22) - 1, 0, STEP=1, BLOCK=4)
    with pytest.raises(Exception, match="program 0, loads 1 elements outside its tensors"):
        _copy_kernel[(1,)](far, volume(8), 2, (3 << 22) - 1, 0, STEP=1, BLOCK=4)
