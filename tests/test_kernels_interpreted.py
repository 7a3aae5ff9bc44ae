"""The kernel tests in Triton's interpreter, in processes of their own (see `kernels/conftest.py`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two cores are what CI has, and the interpreter uses one.
PROCESSES = 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_kernels_in_the_interpreter(request):
    folder = Path(__file__).parent / "kernels"
    files = sorted(str(path) for path in folder.glob("test_*_kernel.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=10"]
    markers = request.config.getoption("markexpr")
    running = [
        subprocess.Popen(
            [*command, *files[i::PROCESSES], *(("-m", markers) if markers else ())],
            env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=folder.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        print(output)
        assert process.returncode == 0, output[-6000:]
        assert " passed" in output
