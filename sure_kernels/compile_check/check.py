"""The run over all kernels: which rows, in which processes, and the table."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import sure_kernels.ops
from sure_kernels.compile_check.cases import Flags, KernelCases, covering_rows
from sure_kernels.compile_check.offline import TARGETS, Outcome, compile_offline

CLASSES = (2, 4, 8, 14, 16, 32)
OTHER_CLASSES = (4,)
# From here on a spill is reported but no failure.
MOST_CLASSES_WITHOUT_SPILL = 16
MAIN_TARGET = "sm_90"


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


def jobs(modules: Sequence[str], targets: Sequence[str], full: bool) -> list[Job]:
    """What to compile.

    Every pair of flags with K in CLASSES on the main target, and every value of each flag with K = 4 on the others.
    With `full` every triple of flags with every K on the main target, and every pair with K in CLASSES on the others.
    """
    found = []
    for module in modules:
        for index, cases in enumerate(importlib.import_module(module).compile_cases()):
            for target in targets:
                main = target == MAIN_TARGET
                strength = 1 + main + full
                flags = dict(cases.flags)
                if "K" in flags and not (full and main):
                    wanted = CLASSES if full or main else OTHER_CLASSES
                    flags["K"] = tuple(k for k in wanted if k in flags["K"])
                rows = covering_rows(flags, cases.reachable, strength)
                found += [Job(module, index, row, target) for row in rows]
    return found


def _start_worker(cache: str) -> None:
    # A fresh cache: kernels that were compiled before are compiled again.
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ.pop("TRITON_INTERPRET", None)


def _run(job: Job) -> Outcome:
    cases = job.cases()
    return compile_offline(cases.kernel, cases.arguments(job.flags), job.target)


def run(work: Sequence[Job], processes: int) -> list[Outcome]:
    """Outcomes in the order of `work`, from new processes that cannot be in interpreter mode."""
    setting = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with tempfile.TemporaryDirectory() as cache:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(processes, context, _start_worker, (cache,)) as pool:
                return list(pool.map(_run, work, chunksize=4))
    finally:
        if setting is not None:
            os.environ["TRITON_INTERPRET"] = setting


def show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(work: Sequence[Job], outcomes: Sequence[Outcome]) -> str:
    """One Markdown row a job."""
    lines = [
        "| kernel | direction | flags | target | registers | shared, B | spills | |",
        "|---|---|---|---|--:|--:|--:|---|",
    ]
    for job, outcome in zip(work, outcomes, strict=True):
        cases = job.cases()
        flags = " ".join(f"{name}={show(value)}" for name, value in job.flags.items())
        verdict = "; ".join(job.faults(outcome)).replace("|", "/").replace("\n", " ") or "ok"
        lines.append(
            f"| {cases.op}.{cases.name} | {cases.direction} | {flags} | {job.target} "
            f"| {outcome.registers} | {outcome.shared} | {outcome.spills} | {verdict} |"
        )
    return "\n".join(lines)


def summary(work: Sequence[Job], outcomes: Sequence[Outcome]) -> str:
    """Counts and the largest register use for each target."""
    counts = Counter(job.target for job in work)
    lines = []
    for target in TARGETS:
        if not counts[target]:
            continue
        mine = [(job, outcome) for job, outcome in zip(work, outcomes, strict=True) if job.target == target]
        failed = sum(bool(job.faults(outcome)) for job, outcome in mine)
        spilled = sum(outcome.spills > 0 for _, outcome in mine)
        most = max(outcome.registers for _, outcome in mine)
        lines.append(
            f"{target}: {len(mine)} compiled, {failed} failed, {spilled} with spills, at most {most} registers"
        )
    return "\n".join(lines)
