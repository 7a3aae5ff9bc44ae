"""The compile check itself: it passes what is right and fails on what is broken."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import toy_kernels

from sure_kernels.compile_check import Arguments, check, covering_rows, kept
from sure_kernels.compile_check.__main__ import main
from sure_kernels.compile_check.cases import AMD_POINTERS, INTEGERS, POINTERS
from sure_kernels.compile_check.offline import TARGETS, Outcome, compilation
from sure_kernels.kernel_lib.launch import warps_of, warps_on

TABLE = Path(__file__).parents[2] / "docs" / "compile-check.csv"
TYPES = {"p_in": "*fp32", "p_out": "*fp32", "stride": "int"}


def compiled(kernel: Any, target: str = "sm_90", integers: str = "i32", **constants: Any) -> Outcome:
    return compilation(kernel, Arguments(TYPES, constants), target, integers).compile()


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_kernel_passes(target):
    outcome = compiled(toy_kernels.sound, target, BLOCK=128)
    assert outcome.faults(spills_allowed=False) == []
    assert outcome.registers > 0


def test_a_spill_fails():
    arguments = Arguments(TYPES, {"BLOCK": 32 * 512}, num_warps=1)
    outcome = compilation(toy_kernels.spilling, arguments, "sm_90").compile()
    assert outcome.spills > 0
    assert any("spills" in fault for fault in outcome.faults(spills_allowed=False))
    assert outcome.faults(spills_allowed=True) == []


@pytest.mark.parametrize(("classes", "fails"), [(2, True), (16, True), (17, False), (32, False)])
def test_spills_fail_up_to_16_classes(classes, fails):
    job = check.Job("toy_kernels", 0, {"K": classes}, "sm_90")
    assert bool(job.faults(Outcome(registers=255, spills=8))) == fails


@pytest.mark.parametrize(
    "kernel",
    [
        toy_kernels.narrow_stride,
        toy_kernels.narrow_block,
        toy_kernels.narrow_in_mask,
        toy_kernels.narrow_in_loop,
        toy_kernels.narrow_in_while,
        toy_kernels.narrow_in_branch,
    ],
    ids=lambda kernel: kernel.fn.__name__,
)
def test_narrow_offsets_fail(kernel):
    outcome = compiled(kernel, BLOCK=128)
    assert outcome.error == ""
    assert any("arith.muli" in fault for fault in outcome.faults(spills_allowed=True))


def test_a_stride_of_32_bits_is_what_shows_it():
    """A product with a 64-bit stride is 64-bit by itself, and strides below 2^31 are what overflows."""
    assert not compiled(toy_kernels.narrow_stride, integers="i64", BLOCK=128).narrow
    for integers in ("i32", "16 i32"):
        assert compiled(toy_kernels.narrow_stride, integers=integers, BLOCK=128).narrow


def test_invalid_code_fails():
    (fault,) = compiled(toy_kernels.invalid, BLOCK=128).faults(spills_allowed=True)
    assert fault.startswith("does not compile")


def test_arguments_are_compiled_as_the_launcher_does():
    def known(integers: str, pointers: str, target: str = "sm_90") -> tuple[Any, ...]:
        return compilation(toy_kernels.sound, Arguments(TYPES, {"BLOCK": 128}), target, integers, pointers)[1:5]

    aligned = [["tt.divisibility", 16]]
    signature = {"p_in": "*fp32", "p_out": "*fp32", "stride": "i32", "BLOCK": "constexpr"}
    assert known("i32", "unaligned") == (signature, {"BLOCK": 128}, {}, 4)
    assert known("16 i64", "unaligned") == (signature | {"stride": "i64"}, {"BLOCK": 128}, {(2,): aligned}, 4)
    constants = {"BLOCK": 128, "stride": 1}
    assert known("1", "unaligned") == (signature | {"stride": "constexpr"}, constants, {}, 4)
    small = [*aligned, ["tt.pointer_range", 32]]
    # Half as many warps, each of 64 lanes.
    assert known("i32", "aligned small", "gfx942")[2:] == ({(0,): small, (1,): small}, 2)


def test_blocks_get_as_many_threads_on_wide_warps(monkeypatch):
    assert [warps_of(number, 64) for number in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert warps_of(8, 32) == 8
    import torch

    assert warps_on(4, torch.device("cpu")) == 4

    class Properties:
        warp_size = 64

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    warps_on.cache_clear()
    assert warps_on(4, torch.device("cuda", 0)) == 2
    warps_on.cache_clear()


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_the_command_fails_on_broken_kernels(broken, status, tmp_path, capsys):
    module = "toy_kernels_broken" if broken else "toy_kernels"
    output, cache = tmp_path / "table.md", tmp_path / "kept.jsonl"
    arguments = ["--module", module, "--target", "sm_90", "--processes", "1", "--cache", str(cache)]
    assert main([*arguments, "--output", str(output)]) == status
    table = capsys.readouterr().out
    for fault in ("32-bit address", "to local memory", "does not compile"):
        assert (fault in table) == broken
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert f"sm_90: {len(rows)} compiled" in table
    assert any("block=128, " in row["flags"] for row in rows)
    assert f"| toy.{rows[0]['kernel'].split('.')[1]} | forward |" in output.read_text()

    # What failed is tried again: it may have been the machine.
    failures = sum("does not compile" in row["verdict"] for row in rows)
    assert len(kept.read(cache)) == len(rows) - failures
    if not broken:
        assert main(arguments) == status
        again = capsys.readouterr()
        assert again.out == table
        assert f"{len(rows)} of {len(rows)} rows, {len(rows)} of them known" in again.err


def test_kept_outcomes_survive_a_kill(tmp_path):
    path = tmp_path / "folder" / "kept.jsonl"
    assert kept.read(path) == {}
    outcomes = {"a": Outcome(32, 0, 0), "b": Outcome(255, 16, 8, "", ("%1 = arith.muli %2, %3 : i32",))}
    for key, outcome in outcomes.items():
        kept.append(path, key, outcome)
    assert kept.read(path) == outcomes
    # A line cut anywhere is lost, and no other.
    line = json.dumps({"key": "c", "registers": 1})
    with path.open("a") as file:
        file.write("\n" + line[: len(line) // 2])
    kept.append(path, "d", outcomes["a"])
    assert kept.read(path) == outcomes | {"d": outcomes["a"]}


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    cache = tmp_path / "kept.jsonl"
    command = [sys.executable, "-m", "sure_kernels.compile_check", "--module", "sure_kernels.ops.ranking.kernel"]
    run = subprocess.Popen([*command, "--processes", "1", "--cache", str(cache)], stdout=subprocess.PIPE)
    while len(kept.read(cache)) < 2:
        assert run.poll() is None
        time.sleep(0.2)
    run.kill()
    # The end of its output, which its workers hold as well: they are gone.
    run.communicate(timeout=60)
    before = len(kept.read(cache))
    result = subprocess.run([*command, "--cache", str(cache)], capture_output=True, text=True, check=True)
    done, total, known = map(int, re.findall(r"\d+", result.stderr.splitlines()[-1])[:3])
    assert done == total
    assert before <= known < total


def test_a_key_tells_compilations_apart():
    def key(kernel=toy_kernels.sound, target="sm_90", integers="i32", pointers="aligned", block=128, warps=4):
        return compilation(kernel, Arguments(TYPES, {"BLOCK": block}, warps), target, integers, pointers).key()

    others = [
        key(kernel=toy_kernels.narrow_stride), key(target="sm_80"), key(integers="16 i32"), key(pointers="unaligned"),
        key(block=256), key(warps=8),
    ]  # fmt: skip
    assert key() == key()
    assert len({key(), *others}) == 1 + len(others)


def test_every_kernel_takes_part():
    modules = check.kernel_modules()
    rooms = {module.split(".")[2] for module in modules}
    assert {"gradient_magnitude", "dirichlet", "evidential", "supervised", "boundary_distance"} <= rooms
    work = check.jobs(modules, list(TARGETS), full=False)
    assert {job.target for job in work} == set(TARGETS)
    classes = {job.flags["K"] for job in work if job.target == "sm_90" and "K" in job.flags}
    assert {2, 4, 8, 14, 16} <= classes
    for target in TARGETS:
        pointers = {job.flags["pointers"] for job in work if job.target == target}
        assert pointers == set(AMD_POINTERS if target == "gfx942" else POINTERS)
        sweeps = [job.flags["integers"] for job in work if job.target == target and "evidence" in job.flags]
        assert set(sweeps) == set(INTEGERS)


def test_the_committed_table_is_of_these_kernels():
    """Kernels, their flags and the values of each are those of today: otherwise `make compile-check-full`."""
    found: dict[tuple[str, ...], dict[str, set[str]]] = {}
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            flags = found.setdefault((row["kernel"], row["direction"], row["target"]), {})
            for name, value in re.findall(r"(\w+)=([^,]*)", row["flags"]):
                flags.setdefault(name, set()).add(value)
            # In a few rows ptxas keeps one or two registers in local memory; nothing else may be wrong.
            assert row["verdict"] in ("ok", "spills 8 to local memory", "spills 16 to local memory")
    expected: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for job in check.jobs(check.kernel_modules(), list(TARGETS), full=True):
        cases = job.cases()
        flags = expected.setdefault((f"{cases.op}.{cases.name}", cases.direction, job.target), {})
        for name, value in job.flags.items():
            flags.setdefault(name, set()).add(str(value))
    assert found == expected


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
