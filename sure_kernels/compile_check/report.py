"""Tables of what was compiled."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import triton

from sure_kernels.compile_check.check import COVERAGE, Job
from sure_kernels.compile_check.offline import TARGETS, Outcome

COLUMNS = ("kernel", "direction", "flags", "target", "registers", "shared", "spills", "verdict")


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rows(work: Sequence[Job], outcomes: Sequence[Outcome]) -> Iterator[tuple[Any, ...]]:
    """One row of COLUMNS for each compiled set of flags."""
    for job, outcome in zip(work, outcomes, strict=True):
        cases = job.cases()
        flags = ", ".join(f"{name}={_show(value)}" for name, value in job.flags.items())
        verdict = "; ".join(job.faults(outcome)).replace("|", "/").replace("\n", " ") or "ok"
        numbers = (outcome.registers, outcome.shared, outcome.spills)
        yield (f"{cases.op}.{cases.name}", cases.direction, flags, job.target, *numbers, verdict)


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in table)


def summary(work: Sequence[Job], outcomes: Sequence[Outcome]) -> str:
    """Counts and the largest register use for each target."""
    lines = []
    for target in TARGETS:
        mine = [(job, outcome) for job, outcome in zip(work, outcomes, strict=True) if job.target == target]
        if not mine:
            continue
        failed = sum(bool(job.faults(outcome)) for job, outcome in mine)
        spilled = sum(outcome.spills > 0 for _, outcome in mine)
        most = max(outcome.registers for _, outcome in mine)
        lines.append(
            f"{target}: {len(mine)} compiled, {failed} failed, {spilled} with spills, at most {most} registers"
        )
    return "\n".join(lines)


def overview(work: Sequence[Job], outcomes: Sequence[Outcome]) -> str:
    """The worst of each kernel on each target: registers / shared memory / spills, and the K at which it spills."""
    found: dict[tuple[str, str], dict[str, list[tuple[Job, Outcome]]]] = {}
    for job, outcome in zip(work, outcomes, strict=True):
        cases = job.cases()
        of_kernel = found.setdefault((f"{cases.op}.{cases.name}", cases.direction), {target: [] for target in TARGETS})
        of_kernel[job.target].append((job, outcome))

    def worst(mine: list[tuple[Job, Outcome]]) -> str:
        if not mine:
            return ""
        most = (max(getattr(o, name) for _, o in mine) for name in ("registers", "shared", "spills"))
        classes = sorted({job.flags["K"] for job, o in mine if o.spills and "K" in job.flags})
        return " / ".join(map(str, most)) + (f" (K = {', '.join(map(str, classes))})" if classes else "")

    return markdown(
        ("kernel", "direction", "rows", *TARGETS),
        (
            (kernel, direction, sum(map(len, targets.values())), *(worst(mine) for mine in targets.values()))
            for (kernel, direction), targets in found.items()
        ),
    )


def faults(work: Sequence[Job], outcomes: Sequence[Outcome]) -> str:
    """The rows that fail the check."""
    failed = [row for row in rows(work, outcomes) if row[-1] != "ok"]
    if not failed:
        return "No row fails the check."
    return f"Rows that fail the check, {len(failed)} of {len(work)}:\n\n" + markdown(COLUMNS, failed)


def write(path: Path, work: Sequence[Job], outcomes: Sequence[Outcome], full: bool) -> None:
    """The overview as Markdown to `path`, and all rows beside it as CSV."""
    table = path.with_suffix(".csv")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(work, outcomes))
    _replace(table, text.getvalue())
    made = f"Triton {triton.__version__}, Python {platform.python_version()}, {datetime.date.today().isoformat()}."
    _replace(
        path,
        f"""# Kernels compiled offline

Made by `make compile-check-full`, without a GPU. {made}

{COVERAGE[full]}

The launcher compiles a kernel anew for what it sees of its run-time arguments, which two more flags stand for:
`integers`, strides and lengths in 32 or 64 bits, multiples of 16, or 1; and `pointers`, aligned to 16 bytes or not, on
gfx942 also whether the storage is `small` (below 2 GiB). On gfx942, whose warps have 64 lanes, kernels get half as many
warps, as their launchers give them.

```
{summary(work, outcomes)}
```

The worst over the rows of each kernel: registers a thread (vector registers on gfx942) / bytes of shared memory a
block / spills (bytes a thread in local memory, on gfx942 vector registers), and at which numbers of classes K it
spills, where it does. Spills fail the check up to K = 16 alone. All rows are in [{table.name}]({table.name}).

{overview(work, outcomes)}

{faults(work, outcomes)}
""",
    )


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
