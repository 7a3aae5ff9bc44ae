"""What `toy_kernels` would be with a bug in it, one kernel for each kind."""

from __future__ import annotations

from toy_kernels import cases_of, invalid, narrow_stride, spilling

from sure_kernels.compile_check import KernelCases


def compile_cases() -> list[KernelCases]:
    return [*cases_of(narrow_stride), *cases_of(spilling, num_warps=1, blocks=(32 * 512,)), *cases_of(invalid)]
