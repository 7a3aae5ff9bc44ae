"""Score a run on a data set: metrics per case and in summary, as JSON, CSV and pictures."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import math
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import monai
import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor
from tqdm import tqdm

import sure
import sure_kernels as sk
from sure.checkpoint import Run, load_run
from sure.data import IGNORE, Case, Dataset, EvaluationCase, check_dataset, discover, format_faults, load_case
from sure.errors import UserError
from sure.files import atomic_folder
from sure.inference import Inference, as_batch, as_volume, infer
from sure.report import figures
from sure_kernels import metrics

KIND = "sure evaluation"
BOUNDARY = 1.0
"""Voxels at most this far from a boundary are on it."""
FAR = 4.0
"""Voxels farther than this from every boundary should be certain."""


def evaluate(
    run_path: Path,
    data_root: Path,
    out: Path,
    *,
    cases: Literal["held-out", "all"] = "held-out",
    checkpoint: str = "final",
    pictures: int | Sequence[str] = 3,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a run and write metrics.json, metrics.csv and pictures to `out`, all of them or nothing.

    Args:
        run_path: folder of a training run.
        data_root: data set in a layout that training reads.
        out: folder to write; an earlier evaluation in it is replaced, anything else is left alone.
        cases: "held-out" scores the run's held-out cases, by name; of a data set that has none of them (another
            one), all that the run was not trained on. "all" scores every case.
        checkpoint: which of the run's checkpoints: final, best or latest.
        pictures: names of the cases to draw, or how many: from the best to the worst Dice in equal steps.
        device: where the network runs.
        progress: show progress bars on stderr.

    Returns:
        What metrics.json holds. Its metrics are means over voxels of a case, None where undefined; `summary`
        gives their mean, sample standard deviation and number of cases where defined. Lengths are in mm,
        distances to the boundary and gradients per voxel of the normalised image.

    Raises:
        UserError: a faulty data set (every fault in one table), a data set unlike the training's, an `out`
            that holds something else.
    """
    run = load_run(run_path, checkpoint=checkpoint, device=device)
    dataset = discover(data_root)
    chosen, cases_from = _choose(run, dataset, cases)
    names = [case.name for case in chosen]
    if isinstance(pictures, int) and pictures < 0:
        raise UserError(f"pictures: expected 0 or more, got {pictures}")
    unknown = [] if isinstance(pictures, int) else sorted(set(pictures) - set(names))
    if unknown:
        raise UserError(f"pictures: expected names of evaluated cases, got {', '.join(unknown)}")
    _check(run, dataset, chosen, cases_from, progress)
    _check_replaceable(out)

    rows, cuts, points = [], {}, []
    curve, ece = metrics.ReliabilityCurve(), metrics.ExpectedCalibrationError()
    for case in tqdm(chosen, desc="evaluating", unit="case", disable=not progress):
        loaded = load_case(case, ignore_label=dataset.ignore_label)
        result = infer(run, loaded.image[None])
        row, on_boundary = score(run, loaded, result)
        rows.append({"name": case.name, **row})
        points.append(on_boundary)
        assert loaded.label is not None
        for state in (curve, ece):
            state.update(result.probability[None], loaded.label.long(), ignore_index=IGNORE)
        cuts[case.name] = _planes(loaded, result)

    keys = [key for key in rows[0] if key != "name"]
    summary = {key: _summary([row[key] for row in rows]) for key in keys}
    drawn = _pick(rows, pictures) if isinstance(pictures, int) else list(pictures)
    reliability = curve.compute()
    report = {
        "kind": KIND,
        "run": str(run_path),
        "checkpoint": run.checkpoint,
        "epoch": run.epoch,
        "loss": run.config.loss,
        "model": run.config.model,
        "spatial_dims": run.config.spatial_dims,
        "class_names": list(run.class_names),
        "dataset": str(data_root),
        "layout": dataset.layout,
        "cases_from": cases_from,
        "cases_missing": sorted(set(run.held_out) - set(names)) if cases_from == "held-out" else [],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "versions": {
            "sure": sure.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
            "numpy": np.__version__,
        },
        "cases": rows,
        "summary": summary,
        "reliability": {name: t.tolist() for name, t in reliability._asdict().items()},
        "pictures": {
            "overlays": {name: f"pictures/case_{name}.png" for name in drawn},
            "planes": {name: f"pictures/case_{name}.npz" for name in drawn},
            "reliability": "pictures/reliability.png",
            "gradient": "pictures/gradient.png",
            "boundary": "pictures/gradient.npz",
        },
    }
    report = _plain(report)
    gradient, uncertainty = (np.concatenate(values) for values in zip(*points, strict=True))
    boundary = figures.BoundaryPoints(gradient, uncertainty, summary["ucc_g"]["mean"]).thinned()
    with atomic_folder(out) as folder:
        (folder / "pictures").mkdir()
        for name in drawn:
            figures.save_planes(folder / report["pictures"]["planes"][name], cuts[name])
            picture = figures.overlay({"": cuts[name]}, run.class_names)
            (folder / report["pictures"]["overlays"][name]).write_bytes(figures.png(picture))
        diagram = figures.reliability({"": (reliability, float(ece.compute()))})
        (folder / "pictures/reliability.png").write_bytes(figures.png(diagram))
        plot = figures.gradient_plots({"": boundary})
        (folder / "pictures/gradient.png").write_bytes(figures.png(plot))
        np.savez_compressed(
            folder / "pictures/gradient.npz", gradient=boundary.gradient, uncertainty=boundary.uncertainty
        )
        (folder / "metrics.csv").write_text(_csv(report["cases"]), encoding="utf-8")
        text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    return report


def score(run: Run, case: EvaluationCase, result: Inference) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
    """All metrics of one case, NaN where undefined, and its boundary voxels' (gradient, uncertainty).

    Metrics of one class are called "dice/CLASS". Ignored voxels count as background in Dice and HD95, and
    nowhere else. A 2D run is scored with the boundaries and gradients of the slices that it sees.
    """
    assert case.label is not None
    truth, valid = case.label.long(), case.label != IGNORE  # (1, *spatial)
    label = torch.where(valid, result.label[None].long(), 0)
    truth = torch.where(valid, truth, 0)
    wrong, uncertainty = (label != truth) & valid, result.uncertainty[None]
    probability = result.probability[None]

    dims = case.image.ndim - 1
    batch = as_batch(case.image[None], run.config.spatial_dims)
    slices = as_batch(case.label[None].long(), run.config.spatial_dims)[:, 0]
    distance = sk.boundary_distance(slices, max_distance=FAR, ignore_index=IGNORE)
    distance, gradient = (as_volume(t, dims)[None] for t in (distance, sk.gradient_magnitude(batch)))
    boundary = (distance <= BOUNDARY) & valid[None]
    far = (distance > FAR) & valid[None]

    row: dict[str, float] = {}
    names = run.class_names
    foreground = {"dice": _dice(label, truth, len(names)), "hd95": _hd95(label, truth, len(names), case)}
    for key, values in foreground.items():
        row[key] = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
        row |= {f"{key}/{name}": float(v) for name, v in zip(names[1:], values, strict=True)}
    row["error_rate"] = float(wrong.sum() / valid.sum()) if valid.any() else math.nan
    row["ece"] = float(metrics.expected_calibration_error(probability, truth, mask=valid))
    per_class = metrics.expected_calibration_error(probability, truth, mask=valid, per_class=True)[0]
    row |= {f"ece/{name}": float(v) for name, v in zip(names, per_class, strict=True)}
    row["brier"] = float(metrics.brier_score(probability, truth, mask=valid))
    row["ueo"] = float(metrics.uncertainty_error_overlap(uncertainty, wrong, mask=valid))
    row["ucc_g"] = float(metrics.uncertainty_correlation(uncertainty, gradient, mask=boundary))
    row["ur_g"] = float(metrics.uncertainty_ratio(uncertainty, gradient, mask=boundary))
    row["uncertainty_boundary"] = float(uncertainty[boundary].double().mean())
    row["uncertainty_far"] = float(uncertainty[far].double().mean())
    return row, (gradient[boundary].numpy(), uncertainty[boundary].numpy())


def _dice(label: Tensor, truth: Tensor, num_classes: int) -> np.ndarray:
    """Dice of each foreground class; NaN where neither has it."""
    mine, theirs = (torch.stack([m == k for k in range(1, num_classes)], 1) for m in (label, truth))
    dice = compute_dice(mine, theirs, ignore_empty=False)[0].numpy()
    empty = ~(mine | theirs).flatten(2).any(2)[0].numpy()
    return np.where(empty, np.nan, dice)


def _hd95(label: Tensor, truth: Tensor, num_classes: int, case: EvaluationCase) -> np.ndarray:
    """HD95 in mm of each foreground class; NaN where prediction or truth lacks it."""
    values = np.full(num_classes - 1, np.nan)
    for k in range(1, num_classes):
        mine, theirs = (label == k)[None], (truth == k)[None]
        if mine.any() and theirs.any():
            with warnings.catch_warnings():  # MONAI warns about an argument of its own
                warnings.simplefilter("ignore", FutureWarning)
                values[k - 1] = compute_hausdorff_distance(
                    mine, theirs, include_background=True, percentile=95, spacing=case.spacing
                )
    return values


def _choose(run: Run, dataset: Dataset, cases: str) -> tuple[list[Case], str]:
    if cases == "all":
        return list(dataset.cases), "all"
    if cases != "held-out":
        raise UserError(f"cases: expected held-out or all, got {cases!r}")
    held_out = [case for case in dataset.cases if case.name in run.held_out]
    if held_out:
        return held_out, "held-out"
    unseen = [case for case in dataset.cases if case.name not in run.train]
    if not unseen:
        raise UserError(
            f"{dataset.root}: the run was trained on every case of that name here; --cases all scores them all the same"
        )
    return unseen, "all that the run was not trained on"


def _check(run: Run, dataset: Dataset, chosen: Sequence[Case], cases_from: str, progress: bool) -> None:
    """Every fault of the chosen cases, and of those that should have been among them."""
    expected = set(run.held_out) if cases_from == "held-out" else None
    problems = tuple(f for f in dataset.problems if expected is None or f.case in expected)
    subset = dataclasses.replace(
        dataset, cases=tuple(chosen), problems=problems, class_names=run.class_names, channels=run.in_channels
    )
    _, faults = check_dataset(subset, num_classes=run.num_classes, progress=progress)
    if faults:
        raise UserError(f"{dataset.root}: {len(faults)} faults:\n{format_faults(faults)}")
    if not chosen:
        raise UserError(f"{dataset.root}: no case to evaluate")


def _planes(case: EvaluationCase, result: Inference) -> tuple[figures.Plane, ...]:
    assert case.label is not None
    truth = torch.where(case.label == IGNORE, 0, case.label)[0]
    return figures.planes(
        case.image[0].numpy(),
        truth.numpy(),
        result.label.numpy(),
        result.uncertainty[0].numpy(),
        case.affine,
    )


def _pick(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """`count` cases from the best to the worst Dice, in equal steps; an undefined Dice comes last."""
    order = sorted(rows, key=lambda row: (math.isnan(row["dice"]), -row["dice"], row["name"]))
    steps = np.rint(np.linspace(0, len(order) - 1, min(count, len(order)))).astype(int)
    return [order[i]["name"] for i in steps]


def _summary(values: Sequence[float]) -> dict[str, float]:
    defined = [v for v in values if not math.isnan(v)]
    return {
        "mean": float(np.mean(defined)) if defined else math.nan,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan,
        "n": len(defined),
    }


def _plain(value: Any) -> Any:
    """What strict JSON holds: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per case; undefined values are left empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _check_replaceable(out: Path) -> None:
    """UserError unless `out` is absent, empty or an earlier evaluation and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: expected a folder, found a file")
    present = {path.name for path in out.iterdir()}
    if not present:
        return
    try:
        earlier = json.loads((out / "metrics.json").read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        earlier = False
    if not earlier or present - {"metrics.json", "metrics.csv", "pictures"}:
        raise UserError(f"{out}: holds something else than an earlier evaluation; choose another folder")
