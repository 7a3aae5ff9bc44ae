"""`python -m sure_kernels.compile_check`: exit status 0 where every kernel passes, else 1."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import triton

from sure_kernels.compile_check.check import jobs, kernel_modules, run, summary, table
from sure_kernels.compile_check.offline import TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sure_kernels.compile_check", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every triple of flags and every K, not every pair")
    parser.add_argument("--module", action="append", help="a module with compile_cases(); all of them by default")
    parser.add_argument("--target", action="append", choices=TARGETS, help="all of them by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args(arguments)
    work = jobs(options.module or kernel_modules(), options.target or list(TARGETS), options.full)
    outcomes = run(work, options.processes)
    rows, counts = table(work, outcomes), summary(work, outcomes)
    print(rows, counts, sep="\n\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        title = f"# Kernels compiled offline\n\nTriton {triton.__version__}. Made by `make compile-check-full`.\n"
        options.output.write_text(f"{title}\n```\n{counts}\n```\n\n{rows}\n")
    return int(any(job.faults(outcome) for job, outcome in zip(work, outcomes, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
