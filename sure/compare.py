"""Does supervision help? Arms trained on the same folds, seeds and schedule, and their paired differences in one table.

The protocol: every arm and fold is trained, evaluated and swept over noise; each is kept, so that a comparison that was
interrupted, or is asked for more arms or folds, goes on from what is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sure.checkpoint import checkpoint_path, load_run, read_experiment, weights_digest
from sure.config import TrainConfig, changes, load_config, load_preset, presets, to_dict
from sure.data import discover, files_digest
from sure.errors import UserError
from sure.evaluate import evaluate
from sure.files import atomic, check_writable, read_json, write_text
from sure.report import figures
from sure.results import csv_table, environment, interval, json_text, plain
from sure.robustness import robustness
from sure.train import choose_device, train

KIND = "sure comparison"
LOSSES = ("edl", "sure", "dice_ce")
PROTOCOL = ("dice", "hd95", "ece", "ueo", "ucc_g", "ur_g", "ucc_d", "ur_d")
"""Metrics at the head of every table; the others follow."""
SWEEPS = ("gaussian_mean",)
"""The published noise sweep."""

OUTPUTS = ("runs", "evaluations", "robustness", "comparison")

Table = dict[str, dict[str, dict[str, float | None]]]
"""Condition, metric, case."""


def compare(
    data: Path,
    out: Path,
    arms: Sequence[str],
    base: TrainConfig,
    *,
    folds: Sequence[int] | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, evaluate and sweep every arm on every fold, then write comparison.json, .csv, .md and .png to `out`.

    Args:
        data: data set in a layout that training reads.
        out: folder to write; holds runs/ARM/fold-K, evaluations/ARM/fold-K and robustness/ARM/fold-K as well. What is
            there already, of the same settings and weights, is used.
        arms: losses (edl, sure, dice_ce), presets, whose objective is taken, or YAML files of settings that differ
            from `base`, named by their stem. The others are compared with the first.
        base: settings that all arms share.
        folds: which of `base.folds`; None takes all.
        device: where networks are trained and run.
        workers: processes that prepare patches.
        progress: show progress bars on stderr.

    Returns:
        What comparison.json holds: `results`, mean and standard deviation over folds of each arm, condition (clean, and
        each level of noise) and metric; `differences` from the first arm, over folds, and over all cases with the
        95 % interval of a bootstrap over cases. Undefined values are None.

    Raises:
        UserError: unknown arms or folds, runs in `out` that were made with other settings or of other data.
    """
    settings = _arms(arms, base)
    wanted = tuple(range(base.folds)) if folds is None else tuple(folds)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(base.folds)):
        raise UserError(f"folds: expected different numbers from 0 to {base.folds - 1}, got {list(wanted)}")
    if out.is_file():
        raise UserError(f"{out}: expected a folder, found a file")
    present = sorted(p for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
    foreign = [p.name for p in present if p.stem not in OUTPUTS]
    if foreign:
        raise UserError(f"{out}: holds something else than a comparison, {foreign[0]}; choose another folder")
    check_writable(out)
    place = choose_device(device)
    runs = {(arm, k): out / "runs" / arm / f"fold-{k}" for k in wanted for arm in settings}
    files = files_digest(discover(data).cases)
    for (arm, k), run in runs.items():
        _check_run(run, replace(settings[arm], fold=k), data, files)

    values: dict[str, list[Table]] = {arm: [] for arm in settings}
    pictures: dict[int, list[str]] = {}
    for (arm, k), run in runs.items():
        if not checkpoint_path(run, "final").is_file():
            options: dict[str, Any] = {"resume": run.exists(), "device": device, "workers": workers}
            train(data, run, replace(settings[arm], fold=k), progress=progress, **options)
        first = runs[next(iter(settings)), k]
        if read_experiment(run).held_out != read_experiment(first).held_out:
            raise UserError(f"{run}: other cases are held out than in {first}; the arms must share their data")
        table, drawn = _scored(run, data, out, Path(arm) / f"fold-{k}", place, progress, pictures.get(k, 3))
        values[arm].append(table)
        pictures.setdefault(k, drawn)  # the first arm's cases, for all

    report: dict[str, Any] = {
        "kind": KIND,
        "dataset": str(data),
        "folds": list(wanted),
        "environment": environment(place),
        "settings": {name: to_dict(c) for name, c in settings.items()},
        "conditions": list(next(iter(values.values()))[0]),
        "results": _results(values),
        "differences": _differences(values),
    }
    report = plain(report)
    write_text(out / "comparison.csv", _csv(report))
    write_text(out / "comparison.md", markdown(report))
    with atomic(out / "comparison.png") as path:
        path.write_bytes(figures.png(_figure(report)))
    write_text(out / "comparison.json", json_text(report))
    return report


def _arms(names: Sequence[str], base: TrainConfig) -> dict[str, TrainConfig]:
    found: dict[str, TrainConfig] = {}
    for name in names:
        path = Path(name)
        if name in LOSSES:
            arm, config = name, replace(base, loss=name)  # type: ignore[arg-type]  # one of them
        elif name in presets():
            arm, config = name, load_preset(name, base)
        elif path.is_file():
            arm, config = path.stem, load_config(path, base)
        else:
            known = ", ".join((*LOSSES, *presets()))
            raise UserError(f"arms: expected {known}, or a YAML file of settings, got {name!r}")
        if arm in found:
            raise UserError(f"arms: expected different names, got {arm} twice")
        apart = [key for key in ("folds", "seed") if getattr(config, key) != getattr(base, key)]
        if apart:
            raise UserError(f"{name}: sets {' and '.join(apart)}, which decide the cases that all arms are to share")
        found[arm] = config
    if len(found) < 2:
        raise UserError(f"arms: expected at least two, got {len(found)}")
    return found


def _check_run(run: Path, config: TrainConfig, data: Path, files: str) -> None:
    """UserError where `run` was trained, or begun, with settings other than `config`, or on data of other `files`."""
    if not (run / "config.yaml").is_file():
        return
    changed = changes(load_config(run / "config.yaml"), config)
    if changed:
        raise UserError(f"{run}: made with other settings: {'; '.join(changed)}; choose another --out")
    if not (run / "run.json").is_file():
        return
    stored = read_experiment(run)
    if stored.files not in (None, files):
        raise UserError(f"{run}: trained on other data ({stored.data}) than {data} holds; choose another --out")


def _scored(
    run: Path,
    data: Path,
    out: Path,
    name: Path,
    device: torch.device,
    progress: bool,
    pictures: int | Sequence[str],
) -> tuple[Table, list[str]]:
    """The sweep of a run, which includes the clean images, and the cases that its evaluation has drawn.

    From their files, or anew where these are of other weights.
    """
    evaluation, sweep = out / "evaluations" / name, out / "robustness" / name
    weights = weights_digest(load_run(run).model)
    drawn = _stored(evaluation / "metrics.json", lambda r: (r.get("weights"), list(r["pictures"]["planes"])), weights)
    if drawn is None or (not isinstance(pictures, int) and drawn != list(pictures)):
        report = evaluate(run, data, evaluation, pictures=pictures, device=device, progress=progress)
        drawn = list(report["pictures"]["planes"])
    table = _stored(sweep / "robustness.json", lambda r: (r["run"].get("weights"), _table(r)), weights)
    if table is None:
        table = _table(robustness(run, data, sweep, corruptions=SWEEPS, device=device, progress=progress))
    return table, drawn


def _stored(path: Path, read: Callable[[Any], tuple[str | None, Any]], weights: str) -> Any:
    """What `read` finds in the file beside the digest of the weights; None without a file, or one of other weights."""
    if not path.is_file():
        return None
    try:
        found, value = read(read_json(path))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"damaged ({type(error).__name__}: {error}); without it, it is made anew"
        raise UserError(f"{path}: {what}") from error
    return value if found == weights else None


def _table(report: Mapping[str, Any]) -> Table:
    table = {"clean": _by_metric(report["clean"]["cases"])}
    for corruption in report["corruptions"]:
        for level in corruption["levels"]:
            table[f"{corruption['name']} {level['level']:g}"] = _by_metric(level["cases"])
    return table


def _by_metric(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    return {key: {row["name"]: row[key] for row in rows} for key in rows[0] if key != "name"}


def _results(values: Mapping[str, Sequence[Table]]) -> list[dict[str, Any]]:
    rows = []
    for arm, folds in values.items():
        for condition, metrics in folds[0].items():
            for metric in metrics:
                means = [_mean(list(fold[condition][metric].values())) for fold in folds]
                spread = {"mean": _mean(means), "std": _std(means)}
                rows.append({"arm": arm, "condition": condition, "metric": metric, **spread, "folds": means})
    return rows


def _differences(values: Mapping[str, Sequence[Table]]) -> list[dict[str, Any]]:
    """Of every other arm from the first: over the folds' means, and over all cases."""
    against, *others = values
    rows = []
    for arm in others:
        for condition, metrics in values[arm][0].items():
            for metric in metrics:
                by_fold = []
                for mine, theirs in zip(values[arm], values[against], strict=True):
                    pairs = [
                        (mine[condition][metric][c], theirs[condition][metric][c]) for c in mine[condition][metric]
                    ]
                    by_fold.append([a - b for a, b in pairs if a is not None and b is not None])
                means = [_mean(fold) for fold in by_fold]
                cases = [d for fold in by_fold for d in fold]
                low, high = interval(cases)
                rows.append(
                    {
                        "arm": arm,
                        "against": against,
                        "condition": condition,
                        "metric": metric,
                        "mean": _mean(means),
                        "std": _std(means),
                        "folds": means,
                        "cases": len(cases),
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if defined else None


def _std(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return float(np.std(defined, ddof=1)) if len(defined) > 1 else None


def _csv(report: Mapping[str, Any]) -> str:
    """A line for each arm, condition and metric; undefined values are left empty."""
    found = {(d["arm"], d["condition"], d["metric"]): d for d in report["differences"]}
    columns = {"difference": "mean", "difference_std": "std", "low": "low", "high": "high"}
    rows = []
    for r in report["results"]:
        d = found.get((r["arm"], r["condition"], r["metric"]), {})
        mine = {key: r[key] for key in ("arm", "condition", "metric", "mean", "std")}
        rows.append(mine | {column: d.get(key) for column, key in columns.items()})
    return csv_table(rows)


def markdown(report: Mapping[str, Any]) -> str:
    """A table for each condition: metrics down, arms across, each but the first with its paired difference."""
    arms = list(report["settings"])
    results = {(r["arm"], r["condition"], r["metric"]): r for r in report["results"]}
    differences = {(d["arm"], d["condition"], d["metric"]): d for d in report["differences"]}
    metrics = dict.fromkeys(r["metric"] for r in report["results"])
    ordered = [m for m in PROTOCOL if m in metrics] + [m for m in metrics if m not in PROTOCOL]
    folds = ", ".join(map(str, report["folds"]))
    lines = [
        f"# {', '.join(arms[1:])} against {arms[0]}",
        "",
        f"{report['dataset']}, folds {folds}. Mean ± standard deviation over the folds; differences from {arms[0]}, "
        "paired by case, with the 95 % interval of a bootstrap over cases.",
    ]
    for condition in report["conditions"]:
        lines += ["", f"## {condition}", "", "| | " + " | ".join(_header(arms)) + " |"]
        lines.append("|---|" + "--:|" * (2 * len(arms) - 1))
        for metric in ordered:
            cells = []
            for arm in arms:
                r = results[arm, condition, metric]
                cells.append(_with_spread(r["mean"], r["std"]))
                if arm != arms[0]:
                    d = differences[arm, condition, metric]
                    interval = "" if d["low"] is None else f" ({_signed(d['low'])} to {_signed(d['high'])})"
                    cells.append(_signed(d["mean"]) + interval)
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _header(arms: Sequence[str]) -> list[str]:
    return [arms[0], *(cell for arm in arms[1:] for cell in (arm, f"{arm} - {arms[0]}"))]


def _with_spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _figure(report: Mapping[str, Any]) -> figures.Figure:
    """Relation against error detection on clean images, and Dice, calibration and error detection under noise."""
    points: dict[str, figures.Arm] = {}
    for arm in report["settings"]:
        mine = {(r["condition"], r["metric"]): r for r in report["results"] if r["arm"] == arm}
        curves: dict[str, list[float]] = {
            metric: [_number(mine[condition, metric]["mean"]) for condition in report["conditions"]]
            for metric in ("dice", "ece", "ueo")
        }
        folds = [[_number(v) for v in mine["clean", metric]["folds"]] for metric in ("ucc_g", "ueo")]
        points[arm] = figures.Arm(folds[0], folds[1], curves)
    return figures.comparison(points, [c.removeprefix("gaussian_mean ") for c in report["conditions"]])


def _number(value: float | None) -> float:
    return math.nan if value is None else value
