"""How the kernel tests run: the same tests, three ways.

- With a GPU: compiled, on device "cuda", as part of any run.
- Without one: in Triton's interpreter, on the CPU. TRITON_INTERPRET=1 must be set before triton is imported, which any
  other test may have done; so `tests/test_kernels_interpreted.py` runs this folder in one process of its own.
  By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels
- Offline compilation (`test_compile_check.py`, `test_launches.py`) runs everywhere but in the interpreter's process.
"""

from __future__ import annotations

import os

import pytest
import torch

import sure_kernels as sk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()

if INTERPRETED:
    collect_ignore_glob = ["test_compile_check.py", "test_launches.py"]
elif not HAS_GPU:
    collect_ignore_glob = ["test_*_kernel.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def triton_backend():
    with sk.backend("triton"):
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill what torch.empty and its kin return with NaN (255 in integers): a kernel must write all of its outputs."""

    def poison(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return x.fill_(float("nan"))
        return x.fill_(255 if x.dtype == torch.uint8 else torch.iinfo(x.dtype).max)

    def poisoned(function):
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
