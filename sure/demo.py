"""The main job from end to end on a CPU: phantoms, an EDL and a SURE network, held-out scores, one report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sure.config import TrainConfig
from sure.data import write_phantoms
from sure.errors import UserError
from sure.evaluate import evaluate
from sure.files import check_writable, resolved, write_text
from sure.report import write_report
from sure.robustness import robustness
from sure.train import train

CASES = 24
SHAPE = (48, 48, 32)
SETTINGS = TrainConfig(
    patch_size=SHAPE,
    channels=(8, 16, 32, 64),
    folds=4,
    epochs=90,
    batch_size=2,
    lr=5e-3,
    validate_every=0,
)
"""What both networks are trained with; only `loss` differs."""
RUNS: dict[str, Literal["edl", "sure"]] = {"EDL": "edl", "SURE": "sure"}
MARKER = ".sure-demo"
OUTPUTS = ("phantoms", "runs", "evaluations", "robustness", "metrics.json", "report.html")
NOISE = (0.1, 0.5, 0.9)
"""Means of the noise that both networks are swept over."""


def demo(out: Path, *, progress: bool = True, settings: TrainConfig = SETTINGS, cases: int = CASES) -> Path:
    """Run the demonstration and return the path of its report.

    Writes phantoms/, runs/, evaluations/, robustness/, metrics.json (the summaries side by side) and report.html to
    `out`. Every number comes from phantoms that neither network was trained on.

    Args:
        out: folder to create; an earlier demo there is replaced.
        progress: show progress bars on stderr.
        settings: training settings; `loss` is set for each run.
        cases: number of phantoms.

    Raises:
        UserError: where `out` is not empty and no demo.
    """
    out = resolved(out)
    check_writable(out)
    if out.exists():
        foreign = sorted({p.name for p in out.iterdir()} - {MARKER, *OUTPUTS}) if out.is_dir() else [out.name]
        if foreign or (any(out.iterdir()) and not (out / MARKER).is_file()):
            raise UserError(f"{out}: is taken by something other than a demo; choose another --out")
        for name in OUTPUTS:
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    write_text(out / MARKER, "made by `sure demo`; replaced by the next one\n")
    data = write_phantoms(out / "phantoms", cases=cases, shape=SHAPE)
    folders, summary = [], {}
    pictures: int | list[str] = 3
    for name, loss in RUNS.items():
        run = train(data, out / "runs" / name, replace(settings, loss=loss), device="cpu", progress=progress)
        folder = out / "evaluations" / name
        result = evaluate(run, data, folder, pictures=pictures, progress=progress)
        pictures = list(result["pictures"]["overlays"])  # the same cases for both
        sweep = out / "robustness" / name
        robustness(run, data, sweep, corruptions=["gaussian_mean"], levels=NOISE, progress=progress)
        folders += [folder, sweep]
        summary[name] = {"cases": [row["name"] for row in result["cases"]], "summary": result["summary"]}
    write_text(out / "metrics.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return write_report(folders, out / "report.html", "EDL and SURE on cardiac phantoms")
