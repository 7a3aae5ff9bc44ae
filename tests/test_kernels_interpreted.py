"""The kernel tests in Triton's interpreter, in a process of their own (see `kernels/conftest.py`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_kernels_in_the_interpreter(request):
    folder = Path(__file__).parent / "kernels"
    command = [sys.executable, "-m", "pytest", str(folder), "-p", "no:cacheprovider", "--durations=10"]
    markers = request.config.getoption("markexpr")
    result = subprocess.run(
        [*command, *(("-m", markers) if markers else ())],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
