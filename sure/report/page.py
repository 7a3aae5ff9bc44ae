"""The comparison page: a Jinja2 template filled with the numbers and pictures of evaluations and sweeps."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sure.errors import UserError
from sure.files import read_json, write_text
from sure.report import figures
from sure.report.glossary import METRICS, UNKNOWN, Metric, describe
from sure.report.slices import Stack, viewer
from sure.results import interval, ranked, summarise
from sure_kernels.metrics import Reliability

TITLES = {"sure": "SURE", "edl": "EDL", "dice_ce": "Dice + CE"}
CASE_COLUMNS = ("dice", "ece", "ueo", "ucc_g")
"""Metrics of the table of all cases."""
SEVERITY_METRICS = ("dice", "ece", "ueo", "uncertainty_boundary")
"""Metrics drawn against the severity of each corruption."""
LARGEST = 10_000_000
"""Bytes of a page."""
MARGIN = 20_000
"""Bytes kept for what stands around each case's pictures."""
FEW_CASES = 10
"""With fewer, the page warns of its intervals."""

Pairs = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class _Evaluation:
    folder: Path
    name: str
    values: dict[str, Any]
    summary: Pairs
    """By metric, as `summarise` gives it."""
    sweep: dict[str, Any] | None
    """What robustness.json of the same run holds."""

    @property
    def cases(self) -> Pairs:
        return {row["name"]: row for row in self.values["cases"]}


def write_report(folders: Sequence[Path], out: Path, title: str = "Segmentation with supervised uncertainty") -> Path:
    """Write one HTML file that needs nothing else: numbers side by side, charts, overlays.

    Args:
        folders: what `sure evaluate` wrote, the first is what the others are compared with; and what
            `sure robustness` wrote of the same runs, in any order.
        out: the .html file to write.
        title: heading of the page.

    Returns:
        `out`.

    Raises:
        UserError: a folder that is neither, the same one twice, no evaluation at all, a sweep of another run.
    """
    if out.is_dir():
        raise UserError(f"{out}: expected a file name, found a folder")
    runs = _load(folders)
    environment = Environment(
        loader=PackageLoader("sure.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["groupby_in_order"] = _grouped
    rows = _rows(runs)
    values: dict[str, Any] = {
        "title": title,
        "same_cases": all(run.cases.keys() == runs[0].cases.keys() for run in runs),
        "few_cases": min(len(run.cases) for run in runs) < FEW_CASES,
        "runs": [{"name": run.name, "cases_missing": [], **run.values} for run in runs],
        "colours": figures.RUN_COLOURS,
        "rows": rows,
        "verdicts": _verdicts(runs, rows),
        "unshared": _unshared(runs),
        "calibration": _calibration(runs),
        "relation": _relation(runs),
        "severities": _severities(runs),
        "glossary": {key: metric for key, metric in METRICS.items() if any(key in run.summary for run in runs)},
        "case_columns": [describe(key).label for key in CASE_COLUMNS],
        "table": _case_table(runs),
        "classes": _classes(runs[0].values["class_names"]),
        "map": figures.colours_of(figures.UNCERTAINTY_MAP),
        "script": Markup((Path(__file__).parent / "viewer.js").read_text(encoding="utf-8")),
    }
    template = environment.get_template("page.html.j2")
    alone = len(template.render(**values, cases=[], top=1.0).encode())
    cases, top = _cases(runs, LARGEST - alone - MARGIN)
    html = template.render(**values, cases=cases, top=top)
    size = len(html.encode())
    if size > LARGEST:
        raise UserError(
            f"{out}: the page would take {size / 1e6:.1f} MB of at most {LARGEST / 1e6:g}: give fewer evaluations, "
            "or evaluate with fewer --pictures"
        )
    write_text(out, html)
    return out


def _load(folders: Sequence[Path]) -> list[_Evaluation]:
    """The evaluations, each with its sweep and under its loss's name, with the folder's where two share a loss."""
    evaluations: list[tuple[Path, str, dict[str, Any]]] = []
    sweeps: list[tuple[Path, dict[str, Any]]] = []
    for folder in map(Path, folders):
        if (folder / "robustness.json").is_file() and not (folder / "metrics.json").is_file():
            sweeps.append((folder, _read(folder, "robustness")))
            continue
        values = _read(folder, "evaluation")
        needed = [*values["pictures"]["planes"].values(), values["pictures"]["boundary"]]
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: incomplete evaluation, {missing[0]} is missing")
        evaluations.append((folder, TITLES.get(values["loss"], values["loss"]), values))
    if not evaluations:
        raise UserError("evaluations: expected at least one folder that sure evaluate wrote")
    losses = [name for _, name, _ in evaluations]
    names = losses
    for depth in (1, 2, 3):  # arms of a comparison differ in a folder above their fold's
        if len(set(names)) < len(names):
            places = ["/".join(folder.resolve().parts[-depth:]) for folder, _, _ in evaluations]
            named = zip(losses, places, strict=True)
            names = [name if losses.count(name) == 1 else f"{name} ({place})" for name, place in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"evaluations: expected distinct folder names, got {', '.join(twice)} twice")
    found: dict[int, dict[str, Any]] = {}
    for folder, sweep in sweeps:
        of = [i for i, (_, _, values) in enumerate(evaluations) if _same_run(values, sweep["run"])]
        if not of:
            of_run = f"{sweep['run']['path']}, checkpoint {sweep['run']['checkpoint']}"
            what = "of which no evaluation was given, or one of other weights"
            raise UserError(f"{folder}: a sweep of {of_run}, {what}")
        if set(of) & set(found):
            raise UserError(f"{folder}: a second sweep of {sweep['run']['path']}")
        found |= dict.fromkeys(of, sweep)
    return [
        _Evaluation(folder, name, values, _summary(values), found.get(i))
        for i, ((folder, _, values), name) in enumerate(zip(evaluations, names, strict=True))
    ]


def _read(folder: Path, what: str) -> dict[str, Any]:
    file = {"evaluation": "metrics.json", "robustness": "robustness.json"}[what]
    try:
        values = read_json(folder / file)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected an evaluation with metrics.json or a sweep ({error})") from error
    command = {"evaluation": "evaluate", "robustness": "robustness"}[what]
    if not isinstance(values, dict) or values.get("kind") != f"sure {what}":
        raise UserError(f"{folder / file}: not written by sure {command}")
    needed = {
        "evaluation": ("loss", "cases", "summary", "reliability", "pictures", "run", "checkpoint"),
        "robustness": ("run", "clean", "corruptions"),
    }[what]
    lacking = [key for key in needed if not values.get(key)]
    if lacking:
        raise UserError(f"{folder / file}: {', '.join(lacking)} missing; run sure {command} anew")
    return values


def _same_run(evaluation: dict[str, Any], run: dict[str, Any]) -> bool:
    told = [key for key in ("checkpoint", "epoch", "weights") if key in evaluation and key in run]
    same = all(evaluation[key] == run[key] for key in told)
    return same and Path(evaluation["run"]).resolve() == Path(run["path"]).resolve()


def _summary(values: dict[str, Any]) -> Pairs:
    """That of the evaluation; of one written before intervals were, its own anew from the cases."""
    stored = values["summary"]
    return stored if all("ci" in entry for entry in stored.values()) else summarise(values["cases"])


def _rows(runs: Sequence[_Evaluation]) -> list[dict[str, Any]]:
    """The tables: per metric, mean and interval of every run, and the paired difference from the first."""
    rows = []
    for key in _keys(runs):
        metric = describe(key)
        cells = []
        for i, run in enumerate(runs):
            summary = run.summary.get(key, {"mean": None, "ci": (None, None), "n": 0})
            cell = {"mean": _number(summary["mean"], metric.digits), "ci": _range(summary["ci"], metric.digits)}
            if i:
                cell |= _difference(runs[0], run, key, metric)
            cells.append(cell)
        of = key.partition("/")[2]
        rows.append(
            {
                "label": of or metric.label,
                "better": metric.better,
                "detail": bool(of),
                "headline": metric.headline and not of,
                "group": metric.group,
                "cells": cells,
            }
        )
    return rows


def _keys(runs: Sequence[_Evaluation]) -> list[str]:
    """Every metric of any run: the glossary's order, then classes in the order of the first run, unknown ones last."""
    present = list(dict.fromkeys(key for run in runs for key in run.summary))
    order = [*METRICS, *(key for key in present if describe(key).group == UNKNOWN)]
    return sorted(present, key=lambda k: order.index(k if k in order else k.partition("/")[0]))


def _difference(base: _Evaluation, other: _Evaluation, key: str, metric: Metric) -> dict[str, str]:
    """Mean of the differences over the cases that both have, its interval, and a verdict where that excludes 0."""
    mine, theirs = other.cases, base.cases
    pairs = [(mine[n].get(key), theirs[n].get(key)) for n in mine if n in theirs]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    if not gaps:
        return {"difference": "–", "range": "", "verdict": ""}
    mean, (low, high) = float(np.mean(gaps)), interval(gaps)
    verdict = ""
    # No verdict on what is printed as 0, or with an end at 0.
    apart = round(low, metric.digits) > 0 or round(high, metric.digits) < 0
    if metric.better and apart:
        verdict = "better" if (mean > 0) == (metric.better == "higher") else "worse"
    return {
        "difference": _number(mean, metric.digits, sign=True),
        "range": _range((low, high), metric.digits, sign=True),
        "verdict": verdict,
    }


def _grouped(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Jinja2's groupby sorts the groups; these keep their order."""
    return [(value, list(members)) for value, members in itertools.groupby(rows, key=lambda row: row[key])]


def _verdicts(runs: Sequence[_Evaluation], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per run but the first, the headline metrics in which it is better, worse, or not told apart."""
    result = []
    for i, run in enumerate(runs[1:], 1):
        told: dict[str, list[str]] = {"better": [], "worse": [], "": []}
        for row in rows:
            if row["headline"] and row["better"] and row["cells"][i]["difference"] != "–":
                told[row["cells"][i]["verdict"]].append(row["label"])
        result.append({"name": run.name, "better": told["better"], "worse": told["worse"], "open": told[""]})
    return result


def _cases(runs: Sequence[_Evaluation], room: int) -> tuple[list[dict[str, Any]], float]:
    """The cases that every run has drawn, or without one every run's own, from the worst Dice of the first run on.

    Each has a picture with all runs in it and, where all have stored slices and `room` characters allow it, what
    the viewer draws; the other result is the end of the scale of uncertainty.
    """
    drawn = {run: list(run.values["pictures"]["planes"]) for run in runs}
    shared = set.intersection(*map(set, drawn.values()))
    order = ranked(runs[0].values["cases"])
    groups = [(name, list(runs)) for name in sorted(shared, key=order.index)]
    groups = groups or [(name, [run]) for run, names in drawn.items() for name in names]
    files = {
        (name, run): run.folder / run.values["pictures"]["planes"][name] for name, members in groups for run in members
    }
    cuts = {key: figures.load_planes(path) for key, path in files.items()}
    slices = {key: figures.load_slices(path) for key, path in files.items()}
    top = figures.uncertainty_top(plane for planes in cuts.values() for plane in planes)
    result = []
    for name, members in groups:
        picture = figures.overlay({r.name: cuts[name, r] for r in members}, members[0].values["class_names"], top)
        scores = [f"{r.name} {_number(r.cases[name]['dice'], METRICS['dice'].digits)}" for r in members]
        result.append(
            {
                "name": name,
                "place": _place(name, members[0]),
                "scores": f"Dice: {', '.join(scores)}",
                "image": _embed(picture),
            }
        )
    room = (room - sum(len(case["image"]) for case in result)) // max(len(result), 1)
    for case, (name, members) in zip(result, groups, strict=True):
        stacks = {r.name: slices[name, r] for r in members}
        case["viewer"] = None if None in stacks.values() else _viewer(name, stacks, room)  # type: ignore[arg-type]
    return result, top


def _viewer(name: str, stacks: dict[str, Stack], room: int) -> dict[str, Any] | None:
    first = next(iter(stacks.values()))
    for run, other in stacks.items():
        if not np.array_equal(first.truth, other.truth):
            raise UserError(f"evaluations: {name} of {run} has another truth than that of {next(iter(stacks))}")
    return viewer(stacks, room)


def _place(name: str, run: _Evaluation) -> str:
    """Where the case stands among all of the run by Dice."""
    order = ranked(run.values["cases"])
    at, end = order.index(name), len(order) - 1
    known = {int(np.rint(end / 2)): "median", end: "best", 0: "worst"}
    return f"{known.get(at, f'place {at + 1} from the worst')} of {len(order)} by Dice of {run.name}"


def _unshared(runs: Sequence[_Evaluation]) -> list[str]:
    """Cases that some runs have drawn and others have not."""
    drawn = [set(run.values["pictures"]["planes"]) for run in runs]
    return sorted(set.union(*drawn) - set.intersection(*drawn))


def _chart(picture: figures.Figure, alt: str, caption: str) -> dict[str, str]:
    return {"image": _embed(picture), "alt": alt, "caption": caption}


def _calibration(runs: Sequence[_Evaluation]) -> list[dict[str, str]]:
    curves = {}
    for run in runs:
        stored = run.values["reliability"]
        curve = Reliability(*(torch.tensor(_floats(stored[name])) for name in Reliability._fields))
        curves[run.name] = (curve, _mean(run, "ece"))
    charts = [
        _chart(
            figures.reliability(curves),
            f"Reliability diagram: accuracy against confidence, {_listed(runs)}",
            "Reliability over all voxels: on the dashed diagonal, confidence is accuracy; above it the network is "
            "right more often than it claims. Below, the share of voxels in each bin. ECE is the mean over cases.",
        )
    ]
    having = _having(runs, "risk_coverage")
    if having:
        charts.append(
            _chart(
                figures.risk_coverage(
                    {
                        run.name: (
                            run.values["risk_coverage"]["coverage"],
                            run.values["risk_coverage"]["risk"],
                            _mean(run, "aurc"),
                        )
                        for run in having
                    }
                ),
                f"Risk-coverage curve: error rate against the share of voxels kept, {_listed(having)}",
                "Risk-coverage over all voxels: the error rate if only the most certain voxels are answered. The lower "
                "the line stays to the left, the better uncertainty sorts out errors. AURC is the mean over cases."
                + _without(runs, having),
            )
        )
    return charts


def _relation(runs: Sequence[_Evaluation]) -> list[dict[str, str]]:
    """Uncertainty against the gradient, a chart for each run, then against the distance and under noise."""
    points = {}
    for run in runs:
        with np.load(run.folder / run.values["pictures"]["boundary"], allow_pickle=False) as stored:
            points[run.name] = figures.BoundaryPoints(stored["gradient"], stored["uncertainty"], _mean(run, "ucc_g"))
    limits = figures.gradient_limits(points.values())
    charts = [
        _chart(
            figures.gradient_plots({name: found}, limits),
            f"Uncertainty against gradient magnitude on boundary voxels, {name}",
            f"{name}: uncertainty against the image's gradient, on the boundary voxels of all cases; the line is the "
            "median in tenths of them. It should fall: where the image shows a sharp edge, the boundary is certain. "
            "The correlation is the mean over cases.",
        )
        for name, found in points.items()
    ]
    having = _having(runs, "by_distance")
    if having:
        profiles = {run.name: _profile(run.values["by_distance"]) for run in having}
        missing = _without(runs, having)
        charts += [
            _chart(
                figures.distance_plot(profiles),
                f"Mean uncertainty against distance from the boundary, {_listed(having)}",
                "Uncertainty against the distance from the true boundary, over the voxels of all cases: far from every "
                "boundary it should vanish." + missing,
            ),
            _chart(
                figures.noise_plot(profiles),
                f"Rise of uncertainty under noise against distance from the boundary, {_listed(having)}",
                "Response to noise: how far mean uncertainty rises when Gaussian noise of standard deviation 0.3 and "
                "the given mean is added to the normalised image. Near the boundary it should rise, the more the "
                "stronger the noise; far from it, not at all." + missing,
            ),
        ]
    return charts


def _profile(stored: dict[str, Any]) -> figures.Profile:
    distances = stored["distance"]
    labels = [f">{distances[-2]}" if d is None else str(d) for d in distances]
    uncertainty = np.array([_floats(values) for values in stored["uncertainty"]])
    return figures.Profile(labels, stored["noise_mean"], uncertainty)


def _severities(runs: Sequence[_Evaluation]) -> list[dict[str, Any]]:
    """Per corruption of any sweep, its metrics against severity, each run that was swept in them."""
    colours = {run.name: i for i, run in enumerate(runs)}
    swept = [run for run in runs if run.sweep]
    names = dict.fromkeys(c["name"] for run in swept for c in run.sweep["corruptions"])  # type: ignore[index]
    result = []
    for name in names:
        found = {}
        for run in swept:
            assert run.sweep is not None
            mine = [c for c in run.sweep["corruptions"] if c["name"] == name]
            if mine:
                found[run] = mine[0]
        about = next(iter(found.values()))
        parameter = about["parameter"] + (f" ({about['unit']})" if about["unit"] else "")
        charts = []
        for key in SEVERITY_METRICS:
            curves = {run.name: _curve(run, corruption, key) for run, corruption in found.items()}
            if any(np.isfinite(curve.mean).any() for curve in curves.values()):
                label = METRICS[key].label
                alt = f"{label} against {parameter}, {_listed(list(found))}"
                charts.append(_chart(figures.severity_plot(curves, label, parameter, colours), alt, ""))
        result.append({"title": about["title"], "charts": charts, "missing": _without(runs, list(found)).strip()})
    return result


def _curve(run: _Evaluation, corruption: dict[str, Any], key: str) -> figures.Severity:
    """From the clean image on; its severity is what leaves the image as it is."""
    assert run.sweep is not None
    clean = run.sweep["noise_response"][corruption["name"]]["levels"][0]
    conditions = [(clean, run.sweep["clean"]["summary"])]
    conditions += [(level["level"], level["summary"]) for level in corruption["levels"]]
    entries = [summary.get(key, {"mean": None, "ci": (None, None)}) for _, summary in conditions]
    low, high = zip(*(_floats(entry.get("ci", (None, None))) for entry in entries), strict=True)
    return figures.Severity(
        [level for level, _ in conditions],
        np.array(_floats([entry["mean"] for entry in entries])),
        np.array(low),
        np.array(high),
    )


def _classes(names: Sequence[str]) -> list[dict[str, str]]:
    """Name and colour of every foreground class."""
    colours = figures.CLASS_COLOURS
    return [{"name": name, "colour": colours[k % len(colours)]} for k, name in enumerate(names[1:])]


def _having(runs: Sequence[_Evaluation], field: str) -> list[_Evaluation]:
    """Runs whose evaluation holds `field`: those of older versions lack some."""
    return [run for run in runs if run.values.get(field)]


def _without(runs: Sequence[_Evaluation], having: Sequence[_Evaluation]) -> str:
    lacking = [run.name for run in runs if run not in having]
    return f" Not measured for {', '.join(lacking)}." if lacking else ""


def _listed(runs: Sequence[_Evaluation]) -> str:
    return " and ".join(run.name for run in runs)


def _mean(run: _Evaluation, key: str) -> float:
    value = run.summary.get(key, {}).get("mean")
    return math.nan if value is None else value


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _case_table(runs: Sequence[_Evaluation]) -> list[dict[str, Any]]:
    """Every case with the metrics of CASE_COLUMNS of every run."""
    names = dict.fromkeys(name for run in runs for name in run.cases)
    return [
        {
            "name": name,
            "cells": [
                _number(run.cases.get(name, {}).get(key), METRICS[key].digits) for key in CASE_COLUMNS for run in runs
            ],
        }
        for name in names
    ]


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """With a real minus sign; a dash where undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    value = round(value, digits) + 0.0  # not -0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _range(ends: Sequence[float | None], digits: int, *, sign: bool = False) -> str:
    """Empty where undefined."""
    low, high = (_number(end, digits, sign=sign) for end in ends)
    return "" if low == "–" else f"{low} to {high}"


def _embed(picture: figures.Figure) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(figures.png(picture)).decode("ascii"))
