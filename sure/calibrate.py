"""When to say nothing: thresholds of uncertainty above which a run abstains, with a bound on the error of the rest.

Conformal risk control (Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024). With a threshold t a voxel counts as
answered where its uncertainty is at most t. The error e_i(t) of case i is the share of wrong voxels among its answered
ones, 0 where none is answered; it may rise and fall with t, so that the loss is its envelope,

    L_i(t) = max over s <= t of e_i(s),

which never falls with t and lies in [0, 1]. Where a patient has several cases, as in ACDC, these are not exchangeable
one by one, and L_i is the mean over the cases of patient i. The largest t of a fixed grid with

    (L_1(t) + ... + L_n(t) + 1) / (n + 1) <= alpha

then has E[e(t)] <= E[L(t)] <= alpha for a new patient who is exchangeable with the n patients, the expectation taken
over both. It holds on average over patients and calibrations: not for each case, nor for each voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sure.checkpoint import Run, load_run, weights_digest
from sure.data import IGNORE, discover, load_case, patient_of
from sure.errors import UserError
from sure.evaluate import check_cases, choose_cases
from sure.files import check_writable, read_json, write_text
from sure.inference import Inference, infer
from sure.results import describe_run, environment, json_text, plain

KIND = "sure calibration"
STEPS = 1000
THRESHOLDS: NDArray[np.float64] = np.arange(1, STEPS + 1) / STEPS
"""The grid, fixed beforehand, as the bound asks for; at 1 every voxel is answered."""

Scope = Literal["overall", "class"]


def calibrate(
    run_path: Path,
    data_root: Path,
    out: Path | None = None,
    *,
    alpha: float = 0.1,
    checkpoint: str = "final",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Find the thresholds of a run on cases it was not trained on, and write them to a JSON file.

    Args:
        run_path: folder of a training run.
        data_root: data set in a layout that training reads. Of it the run's held-out cases are taken, or of another
            data set all cases; never one that the run was trained on.
        out: file to write, by default calibration.json in the run's folder; an earlier calibration is replaced.
        alpha: largest expected error among the answered voxels of a case.
        checkpoint: which of the run's checkpoints. "best" was picked on the held-out cases, which are then not quite
            exchangeable with new ones.
        device: where the network runs.
        progress: show progress bars on stderr.

    Returns:
        What the file holds, see docs/evaluation.md.

    Raises:
        UserError: an `alpha` that so few patients can't give, an `out` that is something else, and as `evaluate`
            raises.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha: expected a number between 0 and 1, got {alpha}")
    out = run_path / "calibration.json" if out is None else out
    if out.is_dir():
        raise UserError(f"{out}: expected a file name, found a folder")
    check_writable(out)
    if out.exists() and not _is_calibration(_read(out)):
        raise UserError(f"{out}: is something else than an earlier calibration; choose another file")
    run = load_run(run_path, checkpoint=checkpoint, device=device)
    dataset = discover(data_root)
    chosen, cases_from = choose_cases(run, dataset, "held-out")
    patients = [patient_of(case) for case in chosen]
    least, found = math.ceil(round(min(1 / alpha, 1e9), 9)) - 1, len(set(patients))
    if found < least:
        raise UserError(
            f"alpha: {alpha:g} takes cases of at least {least} patients, {dataset.root} has {found} for calibration; "
            f"they allow {1 / (found + 1):.4f} and more"
        )
    check_cases(run, dataset, chosen, cases_from, progress)

    answered, wrong = [], []
    for case in tqdm(chosen, desc="calibrating", unit="case", disable=not progress):
        loaded = load_case(case, ignore_label=dataset.ignore_label)
        assert loaded.label is not None
        counts = count_answers(infer(run, loaded.image[None]), loaded.label[0], run.num_classes)
        answered.append(counts[0])
        wrong.append(counts[1])
    of_all, of_wrong = np.stack(answered), np.stack(wrong)  # (cases, 1 + K, thresholds)
    scopes = [_fit(of_all[:, k], of_wrong[:, k], patients, alpha) for k in range(1 + run.num_classes)]
    report = {
        "kind": KIND,
        "run": {"path": str(run_path), **describe_run(run)},
        "data": str(data_root),
        "cases_from": cases_from,
        "cases": [case.name for case in chosen],
        "alpha": alpha,
        "overall": scopes[0],
        "classes": dict(zip(run.class_names, scopes[1:], strict=True)),
        "environment": environment(device),
    }
    report = plain(report)
    write_text(out, json_text(report))
    return report


def count_answers(
    result: Inference, label: Tensor, num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Answered voxels and wrong ones among them, at every threshold: (1 + K, thresholds) each.

    Row 0 is of all voxels, row 1 + k of those predicted to be of class k.

    Args:
        result: what the run says of a case.
        label: (*spatial), IGNORE where ignored.
    """
    valid = label != IGNORE
    predicted = result.label[valid].long().numpy()
    error = predicted != label[valid].long().numpy()
    uncertainty = result.uncertainty[0][valid].double().numpy()
    # The first threshold at which a voxel is answered
    first = np.searchsorted(THRESHOLDS, uncertainty).clip(max=STEPS - 1)
    answered, wrong = (
        np.bincount(predicted[chosen] * STEPS + first[chosen], minlength=num_classes * STEPS)
        .reshape(num_classes, STEPS)
        .cumsum(1)
        .astype(np.float64)
        for chosen in (slice(None), error)
    )
    return np.concatenate([answered.sum(0)[None], answered]), np.concatenate([wrong.sum(0)[None], wrong])


def largest_threshold(losses: NDArray[np.float64], alpha: float) -> int | None:
    """Index of the largest threshold that conformal risk control allows, None where it allows none.

    Args:
        losses: (n, thresholds), of each patient at growing thresholds: in [0, 1], never falling.
        alpha: what the expected loss of a new patient has to stay within.
    """
    allowed = np.flatnonzero((losses.sum(0) + 1) / (len(losses) + 1) <= alpha)
    return int(allowed[-1]) if len(allowed) else None


def losses_of(errors: NDArray[np.float64], patients: Sequence[str]) -> NDArray[np.float64]:
    """Envelopes of the cases' errors (cases, thresholds), averaged over the cases of a patient: (n, thresholds)."""
    envelope = np.maximum.accumulate(errors, axis=1)
    names, of = np.unique(np.array(patients), return_inverse=True)
    total = np.zeros((len(names), errors.shape[1]))
    np.add.at(total, of, envelope)
    return total / np.bincount(of)[:, None]


def _fit(
    answered: NDArray[np.float64], wrong: NDArray[np.float64], patients: Sequence[str], alpha: float
) -> dict[str, Any]:
    """The threshold of one scope from (cases, thresholds); cases without a voxel in it are left out.

    Whether a case has one does not depend on the other cases: those that have are exchangeable with a new one that has.
    """
    there = answered[:, -1] > 0
    answered, wrong = answered[there], wrong[there]
    patients = [name for name, has in zip(patients, there, strict=True) if has]
    errors = np.divide(wrong, answered, out=np.zeros_like(wrong), where=answered > 0)
    result: dict[str, Any] = {"threshold": None, "cases": len(errors), "patients": len(set(patients))}
    if not len(errors):
        return result | {"bound": math.nan, "error": math.nan, "coverage": math.nan, "error_of_all": math.nan}
    losses, before = losses_of(errors, patients), float(errors[:, -1].mean())
    index = largest_threshold(losses, alpha)
    if index is None:  # nothing is answered, and nothing is wrong
        return result | {"bound": 1 / (len(losses) + 1), "error": 0.0, "coverage": 0.0, "error_of_all": before}
    return result | {
        "threshold": float(THRESHOLDS[index]),
        "bound": float((losses[:, index].sum() + 1) / (len(losses) + 1)),
        "error": float(errors[:, index].mean()),
        "coverage": float((answered[:, index] / answered[:, -1]).mean()),
        "error_of_all": before,
    }


@dataclass(frozen=True)
class Abstention:
    """The thresholds of a run by predicted class, 0 where it always abstains."""

    thresholds: tuple[float, ...]

    def mask(self, result: Inference) -> Tensor:
        """Boolean (*spatial), True where the run abstains."""
        limit = torch.tensor(self.thresholds, dtype=torch.float64)[result.label.long()]
        return (result.uncertainty[0].double() > limit) | (limit == 0)


def load_calibration(path: Path, run: Run, scope: Scope = "overall") -> Abstention:
    """The thresholds in a file that `calibrate` wrote.

    Args:
        path: the file.
        run: whose predictions they are for.
        scope: "overall" has one threshold for all voxels, "class" one for the voxels predicted as each class.

    Raises UserError for a file that is none, or is of other weights than the run's.
    """
    if scope not in ("overall", "class"):
        raise UserError(f"abstain: expected overall or class, got {scope!r}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    values = _read(path)
    if not _is_calibration(values):
        raise UserError(f"{path}: not written by sure calibrate")
    try:
        weights = values["run"]["weights"]
        rows = [values["overall"]] * run.num_classes
        if scope == "class":
            rows = [values["classes"][name] for name in run.class_names]
        given = [0 if row["threshold"] is None else row["threshold"] for row in rows]
        wrong = [v for v in given if not isinstance(v, (int, float)) or isinstance(v, bool) or not 0 <= v <= 1]
        if wrong:
            raise ValueError(f"expected thresholds from 0 to 1 or null, found {wrong[0]!r}")
        thresholds = tuple(map(float, given))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a calibration of this run: {type(error).__name__}: {error}") from error
    if weights != weights_digest(run.model):
        raise UserError(f"{path}: is of other weights than the {run.checkpoint} checkpoint of {run.path}")
    return Abstention(thresholds)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_calibration(values: Any) -> bool:
    return isinstance(values, dict) and values.get("kind") == KIND
