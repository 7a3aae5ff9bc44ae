"""The comparison page: a Jinja2 template filled with the numbers and pictures of evaluations."""

from __future__ import annotations

import base64
import json
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
from sure.files import write_text
from sure.report import figures
from sure.report.glossary import METRICS, Metric, describe
from sure_kernels.metrics import Reliability

TITLES = {"sure": "SURE", "edl": "EDL", "dice_ce": "Dice + CE"}
HEADLINES = ("dice", "ucc_g", "uncertainty_far", "ece")


@dataclass(frozen=True)
class _Evaluation:
    folder: Path
    name: str
    values: dict[str, Any]

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.values["cases"]}


def write_report(
    evaluations: Sequence[Path], out: Path, title: str = "Segmentation with supervised uncertainty"
) -> Path:
    """Write one HTML file that needs nothing else: numbers side by side, diagrams, overlays.

    Args:
        evaluations: folders that `sure evaluate` wrote; the first is what the others are compared with.
        out: the .html file to write.
        title: heading of the page.

    Returns:
        `out`.

    Raises:
        UserError: a folder that is no evaluation, the same one twice, or no folder at all.
    """
    if not evaluations:
        raise UserError("evaluations: expected at least one folder")
    if out.is_dir():
        raise UserError(f"{out}: expected a file name, found a folder")
    runs = _load(evaluations)
    environment = Environment(
        loader=PackageLoader("sure.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        title=title,
        same_cases=all(run.cases.keys() == runs[0].cases.keys() for run in runs),
        runs=[{"name": run.name, **run.values} for run in runs],
        colours=figures.RUN_COLOURS,
        tiles=_tiles(runs),
        rows=_rows(runs),
        overlays=_overlays(runs),
        reliability=_embed(_reliability(runs)),
        gradients=_embed(_gradients(runs)),
        glossary=METRICS,
        cases=_case_table(runs),
    )
    write_text(out, html)
    return out


def _load(folders: Sequence[Path]) -> list[_Evaluation]:
    """The evaluations, each under its loss's name, with the folder's where two runs share a loss."""
    loaded = []
    for folder in map(Path, folders):
        try:
            values = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: expected an evaluation with metrics.json ({error})") from error
        if not isinstance(values, dict) or values.get("kind") != "sure evaluation":
            raise UserError(f"{folder / 'metrics.json'}: not written by sure evaluate")
        needed = [*values["pictures"]["planes"].values(), values["pictures"]["boundary"]]
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: incomplete evaluation, {missing[0]} is missing")
        loaded.append((folder, TITLES[values["loss"]], values))
    names = [name for _, name, _ in loaded]
    runs = [
        _Evaluation(folder, name if names.count(name) == 1 else f"{name} ({folder.name})", values)
        for folder, name, values in loaded
    ]
    twice = {run.name for run in runs if [r.name for r in runs].count(run.name) > 1}
    if twice:
        raise UserError(f"evaluations: expected distinct folder names, got {', '.join(sorted(twice))} twice")
    return runs


def _tiles(runs: Sequence[_Evaluation]) -> list[dict[str, Any]]:
    """The headline numbers: label, better direction, and every run's mean."""
    return [
        {"label": METRICS[key].label, "better": METRICS[key].better, "values": _means(runs, key)} for key in HEADLINES
    ]


def _means(runs: Sequence[_Evaluation], key: str) -> list[str]:
    return [_number(run.values["summary"].get(key, {}).get("mean"), METRICS[key].digits) for run in runs]


def _rows(runs: Sequence[_Evaluation]) -> list[dict[str, Any]]:
    """The table: per metric, mean and deviation of every run, and the paired difference to the first."""
    rows = []
    for key in _keys(runs):
        metric = describe(key)
        cells = []
        for i, run in enumerate(runs):
            summary = run.values["summary"].get(key, {"mean": None, "std": None, "n": 0})
            cell = {name: _number(summary[name], metric.digits) for name in ("mean", "std")}
            if i:
                cell |= _difference(runs[0], run, key, metric)
            cells.append(cell)
        of = key.partition("/")[2]
        rows.append({"label": of or metric.label, "better": metric.better, "detail": bool(of), "cells": cells})
    return rows


def _keys(runs: Sequence[_Evaluation]) -> list[str]:
    """Every metric of any run: the glossary's order, then classes in the order of the first run."""
    present = list(dict.fromkeys(key for run in runs for key in run.values["summary"]))
    order = list(METRICS)
    return sorted(
        (k for k in present if k.partition("/")[0] in METRICS), key=lambda k: order.index(k.partition("/")[0])
    )


def _difference(base: _Evaluation, other: _Evaluation, key: str, metric: Metric) -> dict[str, str]:
    """Mean and deviation of the differences over the cases that both have, and what it means."""
    mine, theirs = other.cases, base.cases
    pairs = [(mine[n].get(key), theirs[n].get(key)) for n in mine if n in theirs]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    if not gaps:
        return {"difference": "–", "spread": "", "verdict": ""}
    mean = float(np.mean(gaps))
    spread = _number(float(np.std(gaps, ddof=1)), metric.digits) if len(gaps) > 1 else ""
    verdict, printed = "", round(mean, metric.digits)
    if metric.better and printed:  # no verdict on what is printed as 0
        verdict = "better" if (mean > 0) == (metric.better == "higher") else "worse"
    return {"difference": _number(mean, metric.digits, sign=True), "spread": spread, "verdict": verdict}


def _overlays(runs: Sequence[_Evaluation]) -> list[dict[str, str]]:
    """A picture per case that every run has drawn, with all runs in it; without one, every run's own."""
    drawn = [list(run.values["pictures"]["planes"]) for run in runs]
    shared = [name for name in drawn[0] if all(name in names for names in drawn)]
    groups = [(name, runs) for name in shared] or [
        (name, [run]) for run, names in zip(runs, drawn, strict=True) for name in names
    ]
    result = []
    for name, members in groups:
        cuts = {r.name: figures.load_planes(r.folder / r.values["pictures"]["planes"][name]) for r in members}
        picture = figures.overlay(cuts, members[0].values["class_names"])
        scores = ", ".join(f"Dice {_number(r.cases[name]['dice'], METRICS['dice'].digits)} ({r.name})" for r in members)
        result.append({"name": name, "scores": scores, "image": _embed(figures.png(picture))})
    return result


def _reliability(runs: Sequence[_Evaluation]) -> bytes:
    curves = {}
    for run in runs:
        stored = run.values["reliability"]
        curve = Reliability(*(torch.tensor(_floats(stored[name])) for name in Reliability._fields))
        ece = run.values["summary"]["ece"]["mean"]
        curves[run.name] = (curve, math.nan if ece is None else ece)
    return figures.png(figures.reliability(curves))


def _gradients(runs: Sequence[_Evaluation]) -> bytes:
    points = {}
    for run in runs:
        correlation = run.values["summary"]["ucc_g"]["mean"]
        with np.load(run.folder / run.values["pictures"]["boundary"], allow_pickle=False) as stored:
            points[run.name] = figures.BoundaryPoints(
                stored["gradient"], stored["uncertainty"], math.nan if correlation is None else correlation
            )
    return figures.png(figures.gradient_plots(points))


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _case_table(runs: Sequence[_Evaluation]) -> list[dict[str, Any]]:
    """Every case with every run's headline metrics."""
    names = dict.fromkeys(name for run in runs for name in run.cases)
    return [
        {
            "name": name,
            "cells": [
                _number(run.cases.get(name, {}).get(key), METRICS[key].digits) for key in HEADLINES for run in runs
            ],
        }
        for name in names
    ]


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """With a real minus sign; a dash where undefined."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _embed(png: bytes) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))
