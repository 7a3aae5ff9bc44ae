"""The compile check itself: it passes what is right and fails on what is broken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("triton")

import toy_kernels

from sure_kernels.compile_check import Arguments, check, covering_rows
from sure_kernels.compile_check.__main__ import main
from sure_kernels.compile_check.offline import TARGETS, compile_offline

TYPES = {"p_in": "*fp32", "p_out": "*fp32", "stride": "i32"}


def compiled(kernel: Any, target: str = "sm_90", **constants: Any):
    return compile_offline(kernel, Arguments(TYPES, constants), target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_kernel_passes(target):
    outcome = compiled(toy_kernels.sound, target, BLOCK=128)
    assert outcome.faults(spills_allowed=False) == []
    assert outcome.registers > 0


def test_a_spill_fails():
    outcome = compile_offline(toy_kernels.spilling, Arguments(TYPES, {"BLOCK": 32 * 512}, num_warps=1), "sm_90")
    assert outcome.spills > 0
    assert any("spills" in fault for fault in outcome.faults(spills_allowed=False))
    assert outcome.faults(spills_allowed=True) == []


@pytest.mark.parametrize("kernel", [toy_kernels.narrow_stride, toy_kernels.narrow_block])
def test_narrow_offsets_fail(kernel):
    outcome = compiled(kernel, BLOCK=128)
    assert outcome.error == ""
    assert any("arith.muli" in fault for fault in outcome.faults(spills_allowed=True))


def test_invalid_code_fails():
    (fault,) = compiled(toy_kernels.invalid, BLOCK=128).faults(spills_allowed=True)
    assert fault.startswith("does not compile")


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_the_command_fails_on_a_broken_kernel(broken, status, tmp_path, capsys):
    module = "toy_kernels_broken" if broken else "toy_kernels"
    output = tmp_path / "table.md"
    arguments = ["--module", module, "--target", "sm_90", "--processes", "1", "--output", str(output)]
    assert main(arguments) == status
    table = capsys.readouterr().out
    assert ("32-bit address" in table) == broken
    assert "sm_90: 2 compiled" in table
    assert "block=128" in output.read_text()


def test_every_kernel_takes_part():
    modules = check.kernel_modules()
    rooms = {module.split(".")[2] for module in modules}
    assert {"gradient_magnitude", "dirichlet", "evidential", "supervised", "boundary_distance"} <= rooms
    work = check.jobs(modules, list(TARGETS), full=False)
    assert {job.target for job in work} == set(TARGETS)
    classes = {job.flags["K"] for job in work if job.target == "sm_90" and "K" in job.flags}
    assert {2, 4, 8, 14, 16} <= classes


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_covering_rows_cover(strength):
    flags = {"a": (1, 2, 3), "b": (True, False), "c": ("x", "y"), "d": (0, 1, 2, 3)}

    def reachable(f):
        return not (f["a"] == 3 and f["b"]) and (f["c"] == "x" or f["d"] < 2)

    rows = covering_rows(flags, reachable, strength)
    assert all(reachable(row) for row in rows)
    every = [dict(zip(flags, values, strict=True)) for values in itertools.product(*flags.values())]
    for names in itertools.combinations(flags, strength):
        possible = {tuple(row[n] for n in names) for row in every if reachable(row)}
        assert possible == {tuple(row[n] for n in names) for row in rows}
    assert len(rows) < len(every)
