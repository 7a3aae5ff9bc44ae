"""What the commands that score runs share: summaries over cases, strict JSON, tables, and their output folders."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from numpy.typing import NDArray

import sure
from sure.checkpoint import Run, weights_digest
from sure.errors import UserError
from sure.files import check_writable, read_json

CONFIDENCE = 0.95
RESAMPLES = 2000


def interval(values: Sequence[float] | NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of a mean, over RESAMPLES samples of the values drawn from `seed`.

    NaN for fewer than two values, of which no sample tells anything.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[chosen].mean(1), (tail, 1 - tail))
    return float(low), float(high)


def summarise(rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation, number and `interval` of every metric over the cases where it is defined."""
    summary = {}
    for key in (key for key in rows[0] if key != "name"):
        defined = np.array([row[key] for row in rows if row[key] is not None and not math.isnan(row[key])])
        summary[key] = {
            "mean": float(defined.mean()) if len(defined) else math.nan,
            "std": float(defined.std(ddof=1)) if len(defined) > 1 else math.nan,
            "n": len(defined),
            "ci": list(interval(defined, seed=seed)),
        }
    return summary


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the cases from the worst to the best Dice; those where it is undefined come last."""

    def order(row: Mapping[str, Any]) -> tuple[float, str]:
        dice = row["dice"]
        return math.inf if dice is None or math.isnan(dice) else dice, row["name"]

    return [row["name"] for row in sorted(rows, key=order)]


def describe_run(run: Run) -> dict[str, Any]:
    """What was scored."""
    return {
        "checkpoint": run.checkpoint,
        "epoch": run.epoch,
        "loss": run.config.loss,
        "model": run.config.model,
        "spatial_dims": run.config.spatial_dims,
        "class_names": list(run.class_names),
        "weights": weights_digest(run.model),
    }


def environment(device: str | torch.device) -> dict[str, Any]:
    """When, where and with what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "platform": platform.platform(),
        "versions": {
            "sure": sure.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
            "numpy": np.__version__,
        },
    }


def plain(value: Any) -> Any:
    """What strict JSON holds: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(report: Mapping[str, Any]) -> str:
    """`report`, which `plain` has made strict, as a file holds it."""
    return json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each row; undefined values are left empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def check_replaceable(out: Path, main: str, kind: str, others: Sequence[str]) -> None:
    """UserError unless `out` can be written, and is absent, empty, or an earlier result (`main` of `kind`) alone."""
    check_writable(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: expected a folder, found a file")
    present = {path.name for path in out.iterdir()}
    if not present:
        return
    try:
        earlier = read_json(out / main).get("kind") == kind
    except (OSError, ValueError, AttributeError):
        earlier = False
    if not earlier or present - {main, *others}:
        what = kind.removeprefix("sure ")
        raise UserError(f"{out}: holds something else than an earlier {what}; choose another folder")
