"""Results as a page, the README's tables, a plot and a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import results, steps
from benchmarks.registry import COMPILED_TEXTBOOK, EAGER, FUSED, OURS, TEXTBOOK, Setting, headlines_of
from sure.files import write_text

PAGE = results.ROOT / "benchmarks" / "RESULTS.md"
PLOTS = results.ROOT / "docs" / "images"
README = results.ROOT / "README.md"
# What `plot` writes in the README stands between these.
BEGIN, END = "<!-- begin: python -m benchmarks plot -->", "<!-- end -->"
Row = dict[str, Any]


def _form(row: Row) -> str:
    return f"{row['form']} ({row['backend']})" if "backend" in row else row["form"]


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| op | shape | form | forward | backward | both (fastest, slowest) | ours | kept (added) | peak | GB/s "
        "| of copying |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows = list(rows)
    ours = _our_medians(rows)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) + ("" if row["dtype"] == "float32" else f" {row['dtype']}")
        begin = f"| `{row['op']}` | {shape} | {_form(row)} |"
        if "absent" in row:
            lines.append(f"{begin} {row['absent']} | | | | | | | |")
            continue
        both = row["both"]
        parts = [_milliseconds(row[part]["median"]) if part in row else "" for part in ("forward", "backward")]
        spread = f"{_milliseconds(both['fastest'])} to {_milliseconds(both['slowest'])}"
        kept = f"{row['kept']:.2f}" if "kept" in row else ""
        kept += f" ({row['added']:.2f})" if "added" in row else ""
        faster = f"{both['median'] / ours[_same(row)]:.1f} x" if row["form"] != OURS and _same(row) in ours else ""
        lines.append(
            f"{begin} {parts[0]} | {parts[1]} | {_milliseconds(both['median'])} ({spread}) | {faster} | {kept} "
            f"| {row['peak']:.2f} | {row['gigabytes_per_second']:.1f} | {100 * row['share_of_copy']:.0f} % |"
        )
    return lines


def _origin(machine: dict[str, Any]) -> str:
    """Where, when and of which versions."""
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    packages = ("python", "torch", "triton", "monai")
    versions = ", ".join(f"{name} {machine[name]}" for name in packages if machine.get(name, "-") != "-")
    return f"{where}, {machine['date']}, commit {machine['commit']}, {versions}"


def summary(path: Path) -> str:
    """The README's lines on one file: each op at the headline size beside what one would run instead, and the steps."""
    found = results.read(path)
    lines = [f"{_origin(found['machine'])}; medians of forward and backward where there is one."]
    for setting in headlines_of(found["machine"]):
        lines += ["", *_beside_others(_headline(found["rows"], setting), setting)]
    lines += ["", "*Held for backward* is in units of the logits (of the first argument)."]
    lines += _steps(found)
    return "\n".join(lines)


def _beside_others(rows: Iterable[Row], setting: Setting) -> list[str]:
    by_op: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_op.setdefault(row["op"], {})[row["form"]] = row
    dtype = str(setting.dtype).removeprefix("torch.")
    lines = [
        f"| {setting.shape[0]}^3 voxels, {setting.classes} classes, {dtype} | ours | without compiler | textbook form "
        "| the same under `torch.compile` | held for backward | others |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for op, forms in by_op.items():
        if OURS not in forms:
            continue
        ours = forms[OURS]["both"]["median"]

        def cell(form: str, forms: dict[str, Row] = forms, ours: float = ours) -> str:
            if form not in forms:
                return ""
            seconds = forms[form]["both"]["median"]
            return f"{_milliseconds(seconds)} ({seconds / ours:.1f} x)"

        named = (OURS, EAGER, TEXTBOOK, COMPILED_TEXTBOOK)
        kept = [f"{forms[form]['kept']:.1f}" for form in (OURS, TEXTBOOK) if "kept" in forms.get(form, {})]
        others = ", ".join(
            f"{form} {_milliseconds(r['both']['median'])}" for form, r in forms.items() if form not in named
        )
        cells = (_milliseconds(ours), *(cell(form) for form in named[1:]), " against ".join(kept), others)
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    return lines


def readme(text: str, files: Iterable[Path]) -> str:
    """`text` with the summaries of all files between the marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n" + "\n\n".join(summary(path) for path in files) + f"\n{END}{after}"


def _same(row: Row) -> tuple[Any, ...]:
    """What rows of different forms share."""
    return row["op"], row["sweep"], tuple(row["shape"]), row["dtype"]


def _our_medians(rows: Iterable[Row]) -> dict[tuple[Any, ...], float]:
    return {_same(row): row["both"]["median"] for row in rows if row["form"] == OURS and "both" in row}


def _headline(rows: Iterable[Row], setting: Setting) -> list[Row]:
    dtypes = str(setting.dtype).removeprefix("torch."), "int64"
    return [
        row
        for row in rows
        if row["sweep"] == setting.sweep
        and row["dtype"] in dtypes
        and results.voxels(row) == math.prod(setting.shape)
        and "absent" not in row
    ]


def _verdict(rows: Iterable[Row]) -> list[str]:
    """How the forms that compute the same fare in all of their rows."""
    rows = list(rows)
    ours = _our_medians(rows)
    lines = []
    for form in (TEXTBOOK, COMPILED_TEXTBOOK, FUSED):
        ratios = {
            f"`{row['op']}` {'x'.join(map(str, row['shape']))} {row['dtype']}": row["both"]["median"] / ours[_same(row)]
            for row in rows
            if row["form"] == form and "both" in row and _same(row) in ours
        }
        if not ratios:
            continue
        slower = [f"{name} ({ratio:.2f} x)" for name, ratio in ratios.items() if ratio < 1]
        found = f"slower in {len(slower)}: {', '.join(slower)}" if slower else "slower in none"
        lines.append(
            f"Against the {form} form, in {len(ratios)} rows: {min(ratios.values()):.1f} to {max(ratios.values()):.0f} "
            f"times faster, {found}."
        )
    return lines


def page(files: Iterable[Path]) -> str:
    """RESULTS.md: every file's machine, its headline and all of its rows."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m benchmarks plot` from the files in `results/`; do not edit. Times are medians. *Ours*",
        "is how many times faster sure_kernels is than the row. *Kept* is what autograd holds for backward, *added*",
        "what of it is not an argument, and *peak* the most that was held beyond the arguments, all in units of the",
        "first argument. *GB/s* counts what forward and backward must read and write; *of copying* is its share of",
        "the bandwidth of a plain copy, measured in the same run: the floor of an op that memory binds.",
    ]
    for path in files:
        found = results.read(path)
        machine = found["machine"]
        headline = [row for setting in headlines_of(machine) for row in _headline(found["rows"], setting)]
        lines += [
            *("", f"## {machine['gpu'] or machine['cpu']}", ""),
            f"{_origin(machine)}; a copy moves {machine['copy_bandwidth'] / 1e9:.1f} GB/s.",
            *("", *table(headline), "", *_verdict(found["rows"]), ""),
            f"![Time against volume](../docs/images/{_plot_name(path)})",
            "",
        ]
        if "training" in found:
            lines += [*_training(found["training"]), ""]
        lines += [*_steps(found), ""]
        if "first_call" in found:
            lines += [*_first_call(found["first_call"]), ""]
        if "host" in found:
            lines += [*_host(found["host"]), ""]
        lines += ["<details><summary>All rows</summary>", "", *table(found["rows"]), "", "</details>"]
    return "\n".join(lines) + "\n"


def _training(found: dict[str, Any]) -> list[str]:
    if "absent" in found:
        return [f"A training step was not measured: {found['absent']}."]
    return [
        f"A training step of {found['network']} on patches {'x'.join(map(str, found['shape']))}: "
        + "; ".join(
            f"with the {name} loss {_milliseconds(part['step'])}, {100 * part['share']:.1f} % of it the loss"
            for name, part in found.items()
            if isinstance(part, dict)
        )
        + "."
    ]


def _steps(results: dict[str, Any]) -> list[str]:
    """Beside the published programs, where it is fair: they were timed on a CPU."""
    if "steps" not in results or results["machine"]["gpu"]:
        return []
    lines = ["", "| whole step, network aside | ours | published program | |", "|---|--:|--:|--:|"]
    for name, times in results["steps"].items():
        ours, theirs = times["median"], times["published"]
        lines.append(
            f"| {steps.TITLES[name]} | {_milliseconds(ours)} | {_milliseconds(theirs)} | {theirs / ours:.0f} x |"
        )
    return [*lines, "", "The published programs were timed on two cores of another machine of the same kind."]


def _first_call(found: dict[str, Any]) -> list[str]:
    return [
        "The first loss and gradient of a process: "
        + "; ".join(
            f"`{op}` {times['warm']:.1f} s, and {times['cold']:.0f} s once on a machine, while its kernels are compiled"
            for op, times in found.items()
        )
        + "."
    ]


def _host(found: dict[str, Any]) -> list[str]:
    return [
        "Where a GPU does the work, forward and backward take of the host, launches aside: "
        + "; ".join(
            f"`{op}` {1e6 * times['both']:.0f} us and {times['launches']:.0f} launches" for op, times in found.items()
        )
        + "."
    ]


def _plot_name(path: Path) -> str:
    return f"benchmark-{path.stem}.png"


def plot(path: Path, folder: Path = PLOTS) -> Path:
    """Time against volume, one panel an op; the file's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results.read(path)["rows"] if row["sweep"] == "volume" and "absent" not in row]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure, axes = pyplot.subplots(-(-len(ops) // 3), 3, figsize=(13, 3.6 * -(-len(ops) // 3)), squeeze=False)
    for axis in axes.flat[len(ops) :]:
        axis.set_axis_off()
    for op, axis in zip(ops, axes.flat, strict=False):
        for form in dict.fromkeys(row["form"] for row in rows if row["op"] == op):
            points = sorted(
                (results.voxels(r), r["both"]["median"]) for r in rows if r["op"] == op and r["form"] == form
            )
            style = {"linewidth": 2.5, "color": "black"} if form == OURS else {"linewidth": 1.0}
            axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=form, **style)
        axis.set(title=op, xlabel="voxels", ylabel="seconds")
        axis.legend(fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / _plot_name(path)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out


def write_page() -> list[Path]:
    """Plots, RESULTS.md and the README's tables from every recorded file; what was written."""
    files = sorted(results.FOLDER.glob("*.json"))
    written = [plot(path) for path in files]
    write_text(PAGE, page(files))
    write_text(README, readme(README.read_text(encoding="utf-8"), files))
    return [*written, PAGE, README]


def compare(before: Path, after: Path) -> list[tuple[str, float]]:
    """(row, after / before) of the median time of both, for every row that two files share."""

    def medians(path: Path) -> dict[str, float]:
        return {
            f"{r['op']} | {r['form']} | {'x'.join(map(str, r['shape']))} {r['dtype']}": r["both"]["median"]
            for r in results.read(path)["rows"]
            if "both" in r
        }

    old, new = medians(before), medians(after)
    return [(key, new[key] / old[key]) for key in old if key in new]
