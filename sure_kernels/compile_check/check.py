"""The run over all kernels: which rows, and in which processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sure_kernels.ops
from sure_kernels.compile_check import kept
from sure_kernels.compile_check.cases import Flags, KernelCases, covering_rows
from sure_kernels.compile_check.offline import TARGETS, Outcome, compilation

CLASSES = (2, 4, 8, 14, 16, 32)
OTHER_CLASSES = (4,)
# From here on a spill is reported but no failure.
MOST_CLASSES_WITHOUT_SPILL = 16
MAIN_TARGET = "sm_90"
# Seconds between two lines on how far the run has come.
_PROGRESS = 10.0
# What `jobs` compiles, for whoever reads the table.
COVERAGE = {
    False: "On sm_90 every pair of flags, K = 2, 4, 8, 14, 16 and 32; elsewhere every value of each flag, K = 4.",
    True: "Every pair of flags that dispatch can reach: on sm_90 with the number of classes K as a flag of all its\n"
    "values, elsewhere with K = 2, 4, 8, 14, 16 and 32. Not every combination of three flags and more.",
}


@dataclass(frozen=True)
class Job:
    """One row of flags for one target; names the kernel so that another process can find it."""

    module: str
    index: int
    flags: Flags
    target: str

    def cases(self) -> KernelCases:
        return importlib.import_module(self.module).compile_cases()[self.index]

    def faults(self, outcome: Outcome) -> list[str]:
        classes = self.flags.get("K", self.cases().fewest_classes)
        return outcome.faults(spills_allowed=classes > MOST_CLASSES_WITHOUT_SPILL)


def kernel_modules() -> list[str]:
    """Modules `sure_kernels.ops.*.kernel`."""
    rooms = [f"sure_kernels.ops.{room.name}.kernel" for room in pkgutil.iter_modules(sure_kernels.ops.__path__)]
    return [name for name in rooms if importlib.util.find_spec(name) is not None]


def flags_on(cases: KernelCases, target: str, full: bool) -> dict[str, tuple[Any, ...]]:
    """The flags of a kernel on a target, with the numbers of classes that are compiled there."""
    main = target == MAIN_TARGET
    flags = cases.flags | cases.launch_flags(amd=TARGETS[target].backend == "hip")
    if "K" in flags and not (full and main):
        wanted = CLASSES if full or main else OTHER_CLASSES
        flags["K"] = tuple(k for k in flags["K"] if k in wanted or k > max(CLASSES))
    return flags


def jobs(modules: Sequence[str], targets: Sequence[str], full: bool) -> list[Job]:
    """What to compile.

    Every pair of flags with K in CLASSES on the main target, and every value of each flag with K = 4 on the others.
    With `full` every pair of flags everywhere, with every K on the main target and K in CLASSES on the others.
    """
    found = []
    for module in modules:
        for index, cases in enumerate(importlib.import_module(module).compile_cases()):
            for target in targets:
                strength = 2 if full or target == MAIN_TARGET else 1
                rows = covering_rows(flags_on(cases, target, full), cases.reachable, strength)
                found += [Job(module, index, row, target) for row in rows]
    return found


_known: dict[str, Outcome] = {}


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(known: dict[str, Outcome]) -> None:
    # A parent that is killed cannot end its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.pop("TRITON_INTERPRET", None)
    _known.update(known)


def _run(job: Job) -> tuple[str, Outcome, bool]:
    """(key, outcome, whether it was compiled now)."""
    cases = job.cases()
    launch = {name: job.flags[name] for name in ("integers", "pointers") if name in job.flags}
    what = compilation(cases.kernel, cases.arguments(job.flags), job.target, **launch)
    key = what.key()
    if key in _known:
        return key, _known[key], False
    outcome = what.compile()
    # A failure is tried again: it may be that of the machine.
    if not outcome.error:
        _known[key] = outcome
    return key, outcome, True


def run(work: Sequence[Job], processes: int, cache: Path | None = None) -> list[Outcome]:
    """Outcomes in the order of `work`, from new processes that cannot be in interpreter mode.

    What `cache` holds is not compiled again, and what is compiled is added to it at once.
    """
    known = {} if cache is None else kept.read(cache)
    outcomes: dict[int, Outcome] = {}
    progress = _Progress(len(work))
    setting = os.environ.pop("TRITON_INTERPRET", None)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (known,))
    try:
        futures = {pool.submit(_run, job): i for i, job in enumerate(work)}
        for future in as_completed(futures):
            key, outcome, compiled = future.result()
            if cache is not None and compiled and not outcome.error:
                kept.append(cache, key, outcome)
            outcomes[futures[future]] = outcome
            progress.add(compiled)
    finally:
        pool.shutdown(cancel_futures=True)
        if setting is not None:
            os.environ["TRITON_INTERPRET"] = setting
    return [outcomes[i] for i in range(len(work))]


class _Progress:
    """A line on standard error every few seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.compiled = total, 0, 0
        self.start = self.last = time.monotonic()

    def add(self, compiled: bool) -> None:
        self.done += 1
        self.compiled += compiled
        now = time.monotonic()
        if now - self.last < _PROGRESS and self.done < self.total:
            return
        self.last = now
        left = (self.total - self.done) * (now - self.start) / max(self.compiled, 1) / 60
        known = self.done - self.compiled
        print(
            f"{self.done} of {self.total} rows, {known} of them known; {left:.0f} minutes left at most",
            file=sys.stderr, flush=True,
        )  # fmt: skip
