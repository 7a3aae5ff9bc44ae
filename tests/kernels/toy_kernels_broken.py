"""What `toy_kernels` would be with a bug in it."""

from __future__ import annotations

from toy_kernels import cases_of, narrow_stride

from sure_kernels.compile_check import KernelCases


def compile_cases() -> list[KernelCases]:
    return cases_of(narrow_stride)
