"""`python -m sure_kernels.compile_check`: exit status 0 where every kernel passes, else 1."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sure_kernels.compile_check import report
from sure_kernels.compile_check.check import jobs, kernel_modules, run
from sure_kernels.compile_check.offline import TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sure_kernels.compile_check", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every pair of flags on every target, and every K")
    parser.add_argument("--module", action="append", help="a module with compile_cases(); all of them by default")
    parser.add_argument("--target", action="append", choices=TARGETS, help="all of them by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="a file of outcomes: only what is not in it is compiled, and added")
    parser.add_argument("--output", type=Path, help="write an overview to this Markdown file, all rows to a CSV file")
    options = parser.parse_args(arguments)
    work = jobs(options.module or kernel_modules(), options.target or list(TARGETS), options.full)
    outcomes = run(work, options.processes, options.cache)
    table = report.markdown(report.COLUMNS, report.rows(work, outcomes))
    print(table, report.summary(work, outcomes), sep="\n\n")
    if options.output is not None:
        report.write(options.output, work, outcomes, options.full)
    return int(any(job.faults(outcome) for job, outcome in zip(work, outcomes, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
