"""Compile every kernel for GPUs that need not be there, and look at what came out.

    python -m sure_kernels.compile_check            every pair of flags, in minutes
    python -m sure_kernels.compile_check --full     every pair on every target, every K; with --cache it resumes

A `kernel.py` takes part by a function `compile_cases()` that returns a list of `KernelCases`, one for each kernel
and direction: the flags that dispatch can reach, and how the arguments follow from them (see `cases.py`, and
`ops/gradient_magnitude/kernel.py` for an example).

The check fails where a kernel
- no longer compiles,
- spills registers to memory at 16 classes or fewer,
- multiplies 32-bit integers that end up in an address or a mask (see `addressing.py`).
"""

from sure_kernels.compile_check.cases import Arguments, KernelCases, covering_rows

__all__ = ["Arguments", "KernelCases", "covering_rows"]
