"""How a run bears images that grow worse: every metric of `evaluate` against the severity of each corruption."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sure.checkpoint import load_run
from sure.corruptions import CORRUPTIONS, Corruption, seed_of
from sure.data import discover, load_case
from sure.errors import UserError
from sure.evaluate import check_cases, choose_cases, missing_cases, noise_maps, noise_response
from sure.files import atomic_folder, write_text
from sure.inference import infer
from sure.results import check_replaceable, csv_table, describe_run, environment, json_text, plain, summarise
from sure.scoring import NEAR, CaseScorer, Reasons, Score, Values
from sure_kernels import metrics

KIND = "sure robustness"
DETECTED_BY = "uncertainty_boundary_predicted"
"""What tells a corrupted volume from a clean one without the truth."""


def robustness(
    run_path: Path,
    data_root: Path,
    out: Path,
    *,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    levels: Sequence[float] | None = None,
    seed: int = 0,
    cases: Literal["held-out", "all"] = "held-out",
    checkpoint: str = "final",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Score a run on clean and on corrupted images, and write robustness.json and robustness.csv to `out`.

    A clean image and every level of every corruption are scored by the code of `evaluate`; the clean rows are those of
    metrics.json. What is random in a corruption depends on `seed`, the case's name and the corruption alone, so that
    the levels of a sweep differ in severity only, and adding a corruption, level or case changes no other result.

    Args:
        run_path: folder of a training run.
        data_root: data set in a layout that training reads.
        out: folder to write; an earlier sweep in it is replaced, anything else is left alone.
        corruptions: names from `sure.corruptions.CORRUPTIONS`.
        levels: severities in place of the corruption's own, growing; for one corruption only.
        seed: of the corruptions.
        cases: as `evaluate` takes them.
        checkpoint: which of the run's checkpoints: final, best or latest.
        device: where the network runs.
        progress: show a progress bar on stderr.

    Returns:
        What robustness.json holds, see docs/evaluation.md.

    Raises:
        UserError: unknown corruptions or levels that cannot be, and as `evaluate` raises.
    """
    sweeps = _sweeps(corruptions, levels)
    run = load_run(run_path, checkpoint=checkpoint, device=device)
    dataset = discover(data_root)
    chosen, cases_from = choose_cases(run, dataset, cases)
    check_cases(run, dataset, chosen, cases_from, progress)
    check_replaceable(out, "robustness.json", KIND, ("robustness.csv",))

    clean = _Condition()
    found = {name: [_Condition() for _ in severities] for name, severities in sweeps.items()}
    responses = {name: metrics.NoiseResponse(num_levels=1 + len(severities)) for name, severities in sweeps.items()}
    steps = len(chosen) * (1 + sum(map(len, sweeps.values())))
    with tqdm(total=steps, desc="scoring", unit="volume", disable=not progress) as bar:
        for case in chosen:
            loaded = load_case(case, ignore_label=dataset.ignore_label)
            scorer, result = CaseScorer(run, loaded), infer(run, loaded.image[None])
            before = result.uncertainty
            scored = scorer.score(loaded.image, result)
            bar.update()
            published: dict[float, Tensor] = {}
            for name, severities in sweeps.items():
                corrupt, maps = CORRUPTIONS[name], [before]
                steps_of = (corrupt.clean, *severities)
                for i, condition in enumerate(found[name], 1):
                    with np.errstate(over="ignore", invalid="ignore"):
                        image = corrupt(loaded.image, steps_of[i], seed_of(seed, case.name, name))
                    if not bool(torch.isfinite(image).all()):
                        raise UserError(f"levels: {steps_of[i]:g} of {name} is more than float32 holds ({case.name})")
                    result = infer(run, image[None])
                    maps.append(result.uncertainty)
                    if name == "gaussian_mean":
                        published[steps_of[i]] = result.uncertainty
                    condition.add(case.name, scorer.score(image, result), scorer.response(maps, steps_of[: i + 1]))
                    bar.update()
                stacked = [m[None] for m in maps]
                responses[name].update(stacked, steps_of, distance=scorer.distance, near=NEAR, mask=scorer.valid)
            clean.add(case.name, scored, noise_response(scorer, noise_maps(run, loaded, before, seed, published)))

    report = {
        "kind": KIND,
        "run": {"path": str(run_path), **describe_run(run)},
        "data": str(data_root),
        "layout": dataset.layout,
        "cases_from": cases_from,
        "cases_missing": missing_cases(run, chosen, cases_from),
        "seed": seed,
        "environment": environment(device),
        "clean": clean.report(),
        "corruptions": [
            {
                "name": name,
                **_described(CORRUPTIONS[name]),
                "levels": [
                    {"level": level, **condition.report(), **_detection(clean, condition)}
                    for level, condition in zip(sweeps[name], conditions, strict=True)
                ],
            }
            for name, conditions in found.items()
        ],
        "noise_response": {
            name: _response((CORRUPTIONS[name].clean, *sweeps[name]), state) for name, state in responses.items()
        },
    }
    report = plain(report)
    with atomic_folder(out) as folder:
        write_text(folder / "robustness.csv", csv_table(_table(report)))
        write_text(folder / "robustness.json", json_text(report))
    return report


class _Condition:
    """The rows of all cases under one condition."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.undefined: dict[str, Reasons] = {}

    def add(self, name: str, scored: Score, response: tuple[Values, Reasons]) -> None:
        self.rows.append({"name": name, **scored.values, **response[0]})
        self.undefined[name] = scored.undefined | response[1]

    def report(self) -> dict[str, Any]:
        return {"summary": summarise(self.rows), "cases": self.rows, "undefined": self.undefined}


def _sweeps(corruptions: Sequence[str], levels: Sequence[float] | None) -> dict[str, tuple[float, ...]]:
    """The severities of every corruption asked for."""
    if not corruptions or len(set(corruptions)) < len(corruptions) or not set(corruptions) <= set(CORRUPTIONS):
        known = ", ".join(CORRUPTIONS)
        raise UserError(f"corruptions: expected different names among {known}, got {', '.join(corruptions) or 'none'}")
    if levels is None:
        return {name: CORRUPTIONS[name].levels for name in corruptions}
    if len(corruptions) > 1:
        raise UserError(f"levels: expected one corruption with levels of your own, got {', '.join(corruptions)}")
    name = corruptions[0]
    low, high = CORRUPTIONS[name].clean, CORRUPTIONS[name].limit
    growing = [low, *levels]
    if len(growing) < 2 or not all(a < b < high for a, b in itertools.pairwise(growing)):  # NaN fails too
        given = " ".join(f"{v:g}" for v in levels) or "none"
        raise UserError(f"levels: expected growing numbers above {low:g} and below {high:g} for {name}, got {given}")
    return {name: tuple(levels)}


def _described(corruption: Corruption) -> dict[str, Any]:
    return {"title": corruption.title, "parameter": corruption.parameter, "unit": corruption.unit}


def _detection(clean: _Condition, condition: _Condition) -> dict[str, Any]:
    """AUROC of telling this condition's volumes from the clean ones, and how many of each have the measure."""
    values = [torch.tensor([row[DETECTED_BY] for row in c.rows], dtype=torch.float64) for c in (clean, condition)]
    values = [v[~v.isnan()] for v in values]
    corrupted = torch.cat([torch.full_like(v, i, dtype=torch.bool) for i, v in enumerate(values)])
    auroc = metrics.error_detection_auroc(torch.cat(values), corrupted)
    return {"detection_auroc": float(auroc), "detection_volumes": [len(v) for v in values]}


def _response(levels: Sequence[float], state: metrics.NoiseResponse) -> dict[str, Any]:
    """Over the voxels of all cases together."""
    response = state.compute()
    return {"levels": list(levels), "share": response.share.tolist(), "correlation": float(response.correlation)}


def _table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each condition and case; a clean one has no level."""
    rows = [{"corruption": "clean", "level": None, **row} for row in report["clean"]["cases"]]
    for corruption in report["corruptions"]:
        for level in corruption["levels"]:
            rows += [{"corruption": corruption["name"], "level": level["level"], **row} for row in level["cases"]]
    return rows
