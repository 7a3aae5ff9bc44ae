"""How the kernel tests run: the same tests, three ways.

- With a GPU: compiled, on device "cuda", as part of any run.
- Without one: in Triton's interpreter, on the CPU. TRITON_INTERPRET=1 must be set before triton is imported, which any
  other test may have done; so `tests/test_kernels_interpreted.py` runs this folder in processes of its own. There every
  launch is held to the memory it was given, and to what programs may share (`sanitizer.py`).
  By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels
- Offline compilation (`test_compile_check.py`, `test_launches.py`, `test_planned_launches.py`) runs everywhere but in
  the interpreter's process.
- `test_gpu_kernel.py` needs a GPU for its full sizes; the interpreter runs the same code at tiny ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import sure_kernels as sk
from sure_kernels.kernel_lib.launch import forget_plans

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()

if INTERPRETED:
    import sanitizer  # it imports the interpreter

    sanitizer.install()
    collect_ignore_glob = ["test_compile_check.py", "test_launches.py", "test_planned_launches.py"]
elif not HAS_GPU:
    # But for the tests that only a GPU can run in full: skipped by name, so that nobody takes them for run.
    collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*_kernel.py") if p.name != "test_gpu_kernel.py"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def triton_backend():
    with sk.backend("triton"):
        yield


@pytest.fixture
def monkeypatch(monkeypatch):
    """Launches are planned once for equal arguments: what a test changes about them has to show at once."""
    change = monkeypatch.setattr

    def changed(*args, **kwargs):
        change(*args, **kwargs)
        forget_plans()

    monkeypatch.setattr = changed
    yield monkeypatch
    forget_plans()


# Elements before and after what torch.empty returns where `poisoned_memory` watches.
GUARD = 64


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill what torch.empty and its kin return, and what lies around it, with NaN (the largest number in integers).

    A kernel must write all of its outputs, and nothing beside them: that is looked at when the test is over.
    """
    watched: list[tuple[torch.Tensor, int]] = []

    def filling(dtype: torch.dtype) -> float | int:
        return float("nan") if dtype.is_floating_point else dtype == torch.bool or torch.iinfo(dtype).max

    def poisoned(function):
        def guarded(*args, **kwargs):
            x = function(*args, **kwargs)
            if type(x) is not torch.Tensor or x.is_meta:
                return x
            # Of dense tensors of any memory format: storage and elements are equally many.
            around = empty(x.numel() + 2 * GUARD, dtype=x.dtype, device=x.device).fill_(filling(x.dtype))
            watched.append((around, x.numel()))
            return x.set_(around.untyped_storage(), GUARD, x.shape, x.stride())

        return guarded

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield
    for around, size in watched:
        for guard in (around[:GUARD], around[GUARD + size :]):
            expected = torch.full_like(guard, filling(guard.dtype))
            assert torch.equal(guard.view(torch.uint8), expected.view(torch.uint8)), "written beside an output"
