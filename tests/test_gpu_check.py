"""`scripts/gpu_check.sh` without a GPU: what it says, and what it does around programs that stand in for Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands in for the interpreter: names a machine, and fails in the step that FAILS names.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"-c "*) echo some-gpu; exit 0 ;;
    "-m sure_kernels"*) step=doctor ;;
    *compute*) step=memcheck ;;
    *"gpu_kernel or"*) step=large ;;
    *test_special_kernel.py*) step=special ;;
    *test_properties_kernel.py*) step=properties; [ "$FAILS" = properties ] || { echo "no tests ran"; exit 5; } ;;
    *"benchmarks run"*) step=benchmarks ;;
    *"benchmarks profile"*) step=profile ;;
    *) step=other ;;
esac
echo "step $step"
[ "$FAILS" = "slow $step" ] && sleep 60
[ "$FAILS" != "$step" ]
"""
SANITIZER = """#!/usr/bin/env bash
echo "memcheck of $*"
[ "$FAILS" != memcheck ]
"""


def run(python: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *arguments],
        env={**os.environ, "PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu():
    result = run(sys.executable, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gpu-check: torch ")
    assert "finds no CUDA or ROCm device" in line


def test_without_python(tmp_path):
    result = run(tmp_path / "no-python")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"gpu-check: PYTHON: expected a Python interpreter, got {tmp_path / 'no-python'}"
    ]


def test_make_leaves_the_environment_alone():
    """On a machine with a GPU, `make venv` might bring another torch."""
    makefile = (ROOT / "Makefile").read_text()
    assert "\ngpu-check: ##" in makefile


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def check(folder: Path, fails: str = "", seconds: int = 520) -> tuple[int, str]:
    """(exit status, summary) of a run in which one step fails."""
    results = folder / "results"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    result = run(folder / "python", str(results), PATH=path, FAILS=fails, GPU_CHECK_SECONDS=str(seconds))
    summary = (results / "summary.txt").read_text()
    assert result.stdout.endswith(summary)
    return result.returncode, summary


def test_every_step_runs(stand_ins):
    status, summary = check(stand_ins)
    assert status == 0
    assert summary.startswith("some-gpu, ")
    steps = ["doctor", "tests", "large", "memcheck", "benchmarks", "profile"]
    lines = [line for line in summary.splitlines() if line.startswith("== ")]
    assert [line.split(":")[0] for line in lines] == [f"== {step}" for step in steps]
    assert all(": ok, " in line for line in lines)
    assert "test_properties_kernel: nothing to run" in summary
    files = {path.stem for path in (ROOT / "tests" / "kernels").glob("test_*_kernel.py")} - {"test_gpu_kernel"}
    for name in (*steps[:1], *steps[2:], *files):
        assert (stand_ins / "results" / f"{name}.txt").exists(), name


@pytest.mark.parametrize("fails", ["special", "properties", "large"])
def test_wrong_kernels_are_not_timed(fails, stand_ins):
    status, summary = check(stand_ins, fails)
    assert status == 1
    assert "FAILED: status 1" in summary
    assert "== memcheck: ok" in summary
    assert "== benchmarks: not run" in summary
    assert "== profile" not in summary


@pytest.mark.parametrize("fails", ["doctor", "memcheck", "benchmarks", "profile"])
def test_a_failed_step_does_not_hide_the_others(fails, stand_ins):
    status, summary = check(stand_ins, fails)
    assert status == 1
    assert [line for line in summary.splitlines() if "FAILED" in line] == [
        line for line in summary.splitlines() if line.startswith(f"== {fails}: FAILED: status 1")
    ]
    assert "== tests: ok" in summary
    assert "== profile" in summary


def test_steps_without_time_are_named(stand_ins):
    status, summary = check(stand_ins, seconds=10)
    assert status == 1
    assert summary.count("no time left") == 4
    assert "== benchmarks: not run" in summary


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped(stand_ins):
    status, summary = check(stand_ins, "slow special", seconds=16)
    assert status == 1
    assert "test_special_kernel: FAILED: not done in" in summary
    assert "test_ranking_kernel: ok" in summary
