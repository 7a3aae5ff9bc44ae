"""`python -m benchmarks COMMAND`: the ops against what a user would run instead, and where their time goes.

python -m benchmarks run --largest 128            # print; --out FILE.json keeps it
python -m benchmarks run --record                 # green tests and a clean tree: benchmarks/results/MACHINE.json
python -m benchmarks plot                         # RESULTS.md, plots and the README's tables from all recorded files
python -m benchmarks profile --size 256           # where the time of one op goes
python -m benchmarks host                         # what a call costs the host of a GPU; needs none
python -m benchmarks instructions                 # machine instructions a voxel, of kernels bound by them; offline
python -m benchmarks compare OLD.json NEW.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import host, instructions, report, results
from benchmarks.registry import CASES
from benchmarks.run import kernel_profile, measure_all


def _run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    out, onto = options.out, None
    if options.onto is not None:
        onto, out = results.read(options.onto), options.onto
        reason = results.why_not_onto(onto, device)
        if reason is not None:
            print(f"nothing is added to {out}: {reason}", file=sys.stderr)
            return 1
    if options.record:
        reason = results.why_not_record()
        if reason is not None:
            print(f"nothing is recorded: {reason}", file=sys.stderr)
            return 1
        out = results.default_path(device)
    found = measure_all(
        device,
        ops=options.op,
        quick=options.quick,
        largest=options.largest,
        out=out,
        budget=options.budget,
        onto=onto,
    )
    results.check(found)
    if out is not None:
        print(f"written to {out}")
    return 0


def _plot(options: argparse.Namespace) -> int:
    for path in report.write_page():
        print(f"written: {path}")
    return 0


def _profile(options: argparse.Namespace) -> int:
    print(kernel_profile(torch.device(options.device), options.op, options.size, options.out))
    return 0


def _host(options: argparse.Namespace) -> int:
    for op, times in host.seconds().items():
        forward, both = 1e6 * times["forward"], 1e6 * times["both"]
        print(f"{op:32s} forward {forward:5.0f} us, with backward {both:5.0f} us, {times['launches']} launches")
    return 0


def _instructions(options: argparse.Namespace) -> int:
    print(instructions.table(tuple(options.classes)))
    return 0


def _compare(options: argparse.Namespace) -> int:
    ratios = report.compare(options.before, options.after)
    for row, ratio in sorted(ratios, key=lambda pair: -pair[1]):
        print(f"{ratio:6.2f}  {row}")
    slower = [row for row, ratio in ratios if ratio > options.slower]
    print(f"{len(ratios)} rows, {len(slower)} slower by more than {100 * (options.slower - 1):.0f} %")
    return int(bool(slower))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--op", action="append", choices=[case.op for case in CASES], help="only this one; repeatable")
    run.add_argument("--quick", action="store_true", help="two small sizes")
    run.add_argument("--largest", type=int, help="voxels along an axis beyond which no size is run")
    run.add_argument("--budget", type=float, help="seconds after which no further size is begun")
    target = run.add_mutually_exclusive_group()
    target.add_argument("--out", type=Path, help="write the results as JSON, after every row")
    target.add_argument("--onto", type=Path, help="add the sizes that a file of this commit and machine lacks")
    target.add_argument("--record", action="store_true", help="write to benchmarks/results, if tests and tree allow")
    run.set_defaults(command=_run)
    plot = commands.add_parser("plot", help="make RESULTS.md, the plots and the README's tables")
    plot.set_defaults(command=_plot)
    profile = commands.add_parser("profile", help="where the time of a large case goes, kernel by kernel")
    profile.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    profile.add_argument("--op", default="supervised_evidential_loss", choices=[case.op for case in CASES])
    profile.add_argument("--size", type=int, default=256, help="voxels along each axis")
    profile.add_argument("--out", type=Path, help="write the trace, for chrome://tracing or Perfetto")
    profile.set_defaults(command=_profile)
    of_host = commands.add_parser("host", help="what a call costs the host of a GPU, launches aside; needs none")
    of_host.set_defaults(command=_host)
    of_sweeps = commands.add_parser(
        "instructions", help="machine instructions a voxel of the kernels bound by them; offline"
    )
    of_sweeps.add_argument("--classes", type=int, nargs="+", default=[2, 4, 8, 16])
    of_sweeps.set_defaults(command=_instructions)
    compare = commands.add_parser("compare", help="two files, row by row; fails where something became slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--slower", type=float, default=1.2, help="ratio of times from which on a row is slower")
    compare.set_defaults(command=_compare)
    options = parser.parse_args(arguments)
    return options.command(options)


if __name__ == "__main__":
    sys.exit(main())
