"""Score a run on a data set: metrics per case and in summary, as JSON, CSV and pictures."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sure.checkpoint import Run, load_run
from sure.corruptions import CORRUPTIONS, seed_of
from sure.data import IGNORE, Case, Dataset, EvaluationCase, check_dataset, discover, format_faults, load_case
from sure.errors import UserError
from sure.files import atomic_folder, write_text
from sure.inference import infer
from sure.report import figures
from sure.report.slices import Stack, stack
from sure.results import check_replaceable, csv_table, describe_run, environment, json_text, plain, ranked, summarise
from sure.scoring import REACH, CaseScorer, joined, pooled, risk_coverage
from sure_kernels import metrics

KIND = "sure evaluation"
NOISE_MEANS = (0.1, 0.9)
"""The published pair of noise levels: means of noise of standard deviation 0.3 on a normalised image."""


def evaluate(
    run_path: Path,
    data_root: Path,
    out: Path,
    *,
    cases: Literal["held-out", "all"] = "held-out",
    checkpoint: str = "final",
    seed: int = 0,
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
        seed: of the noise that shows how uncertainty answers to it.
        pictures: names of the cases to draw, or how many: the worst by Dice, the worst and the median, or from the
            worst to the best in equal steps.
        device: where the network runs.
        progress: show progress bars on stderr.

    Returns:
        What metrics.json holds; docs/evaluation.md defines its metrics. They are None where undefined, and
        `undefined` says why. `summary` gives mean, sample standard deviation, number of cases where defined, and
        the 95 % interval of a bootstrap over cases.

    Raises:
        UserError: a faulty data set (every fault in one table), a data set unlike the training's, an `out`
            that holds something else.
    """
    run = load_run(run_path, checkpoint=checkpoint, device=device)
    dataset = discover(data_root)
    chosen, cases_from = choose_cases(run, dataset, cases)
    names = [case.name for case in chosen]
    if isinstance(pictures, int) and pictures < 0:
        raise UserError(f"pictures: expected 0 or more, got {pictures}")
    unknown = [] if isinstance(pictures, int) else sorted(set(pictures) - set(names))
    if unknown:
        raise UserError(f"pictures: expected names of evaluated cases, got {', '.join(unknown)}")
    check_cases(run, dataset, chosen, cases_from, progress)
    check_replaceable(out, "metrics.json", KIND, ("metrics.csv", "pictures"))

    rows, scores, profiles, undefined = [], [], [], {}
    for case in tqdm(chosen, desc="evaluating", unit="case", disable=not progress):
        loaded = load_case(case, ignore_label=dataset.ignore_label)
        scorer, result = CaseScorer(run, loaded), infer(run, loaded.image[None])
        scored = scorer.score(loaded.image, result)
        scores.append(scored)
        maps = noise_maps(run, loaded, result.uncertainty, seed)
        answer, reasons = noise_response(scorer, maps)
        profiles.append(scorer.profile(maps))
        rows.append({"name": case.name, **scored.values, **answer})
        undefined[case.name] = scored.undefined | reasons

    summary = summarise(rows)
    drawn = _pick(rows, pictures) if isinstance(pictures, int) else list(pictures)
    total = joined([s.histograms for s in scores])
    together, pooled_values = pooled(total, run.class_names)
    report = {
        "kind": KIND,
        "run": str(run_path),
        **describe_run(run),
        "dataset": str(data_root),
        "layout": dataset.layout,
        "cases_from": cases_from,
        "cases_missing": missing_cases(run, chosen, cases_from),
        "seed": seed,
        **environment(device),
        "cases": rows,
        "undefined": undefined,
        "summary": summary,
        "pooled": pooled_values,
        "reliability": _lists(together.reliability),
        "reliability_per_class": {
            name: _lists(metrics.Reliability(*(t[k] for t in together.reliability_per_class)))
            for k, name in enumerate(run.class_names)
        },
        "risk_coverage": risk_coverage(total),
        "by_distance": _by_distance(profiles),
        "pictures": {
            "overlays": {name: f"pictures/case_{name}.png" for name in drawn},
            "planes": {name: f"pictures/case_{name}.npz" for name in drawn},
            "reliability": "pictures/reliability.png",
            "gradient": "pictures/gradient.png",
            "boundary": "pictures/gradient.npz",
        },
    }
    report = plain(report)
    gradient, uncertainty = (torch.cat(parts).numpy() for parts in zip(*(s.boundary for s in scores), strict=True))
    boundary = figures.BoundaryPoints(gradient, uncertainty, summary["ucc_g"]["mean"]).thinned()
    with atomic_folder(out) as folder:
        (folder / "pictures").mkdir()
        for name in drawn:
            cuts, slices = _cuts(run, dataset, next(case for case in chosen if case.name == name))
            figures.save_planes(folder / report["pictures"]["planes"][name], cuts, slices)
            picture = figures.overlay({"": cuts}, run.class_names)
            (folder / report["pictures"]["overlays"][name]).write_bytes(figures.png(picture))
        diagram = figures.reliability({"": (together.reliability, pooled_values["ece"])})
        (folder / "pictures/reliability.png").write_bytes(figures.png(diagram))
        plot = figures.gradient_plots({"": boundary})
        (folder / "pictures/gradient.png").write_bytes(figures.png(plot))
        figures.save_arrays(
            folder / "pictures/gradient.npz", gradient=boundary.gradient, uncertainty=boundary.uncertainty
        )
        write_text(folder / "metrics.csv", csv_table(report["cases"]))
        write_text(folder / "metrics.json", json_text(report))
    return report


def noise_maps(
    run: Run, case: EvaluationCase, clean: Tensor, seed: int, known: Mapping[float, Tensor] = MappingProxyType({})
) -> list[Tensor]:
    """Uncertainty (1, *spatial) of a case as it is, `clean`, and under the published pair of noise levels.

    Args:
        seed: of the noise, drawn for each case: one field at both means.
        known: uncertainty under noise of a mean, where a sweep has it already.
    """
    corrupt, field = CORRUPTIONS["gaussian_mean"], seed_of(seed, case.name, "gaussian_mean")
    noised = [
        known[mean] if mean in known else infer(run, corrupt(case.image, mean, field)[None]).uncertainty
        for mean in NOISE_MEANS
    ]
    return [clean, *noised]


def noise_response(scorer: CaseScorer, maps: Sequence[Tensor]) -> tuple[dict[str, float], dict[str, str]]:
    """UCC_d, UR_d and the noise response of what `noise_maps` gives.

    The distance is set against the rise from the clean image to the weaker noise, the share counts voxels whose
    uncertainty rises from the weaker to the stronger.
    """
    return scorer.response(maps, (0.0, *NOISE_MEANS), noised=1)


def choose_cases(run: Run, dataset: Dataset, cases: str) -> tuple[list[Case], str]:
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


def missing_cases(run: Run, chosen: Sequence[Case], cases_from: str) -> list[str]:
    """Held-out cases that the data set lacks."""
    return sorted(set(run.held_out) - {case.name for case in chosen}) if cases_from == "held-out" else []


def check_cases(run: Run, dataset: Dataset, chosen: Sequence[Case], cases_from: str, progress: bool) -> None:
    """Every fault of the chosen cases, and of those that should have been among them."""
    expected = set(run.held_out) if cases_from == "held-out" else None
    problems = tuple(f for f in dataset.problems if expected is None or f.case in expected)
    subset = dataclasses.replace(
        dataset, cases=tuple(chosen), problems=problems, class_names=run.class_names, channels=run.in_channels
    )
    _check_classes(run, dataset)
    classes, dims = run.num_classes, run.config.spatial_dims
    _, faults = check_dataset(subset, num_classes=classes, spatial_dims=dims, progress=progress)
    if faults:
        raise UserError(f"{dataset.root}: {len(faults)} faults:\n{format_faults(faults)}")
    if not chosen:
        raise UserError(f"{dataset.root}: no case to evaluate")
    if progress:
        tqdm.write(_choice(run, dataset, chosen, cases_from), file=sys.stderr)


def _check_classes(run: Run, dataset: Dataset) -> None:
    """UserError where the data set declares a class of the run under another number: classes go by number."""
    numbers = {name: k for k, name in enumerate(run.class_names)}
    moved = [
        f"{name} is {k}, {numbers[name]} in the run"
        for k, name in enumerate(dataset.class_names or ())
        if numbers.get(name, k) != k
    ]
    if moved:
        raise UserError(f"{dataset.root}: expected the run's classes, found other numbers: {'; '.join(moved)}")


def _choice(run: Run, dataset: Dataset, chosen: Sequence[Case], cases_from: str) -> str:
    """Which cases are scored, and which are not, in a line."""
    parts = [f"{dataset.root}: {len(chosen)} of {len(dataset.cases)} cases ({cases_from})"]
    left = sorted({case.name for case in dataset.cases} - {case.name for case in chosen})
    missing = missing_cases(run, chosen, cases_from)
    for names, what in ((left, "left out"), (missing, "held out by the run, but not here")):
        if names:
            parts.append(f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
    named = [(own, its) for own, its in zip(run.class_names, dataset.class_names or (), strict=False) if own != its]
    if named:
        parts.append("classes go by number: " + ", ".join(f"{its} as {own}" for own, its in named))
    return "; ".join(parts)


def _by_distance(profiles: Sequence[Tensor]) -> dict[str, Any]:
    """Mean uncertainty of all voxels at each distance from the boundary, clean and under noise."""
    voxels, *sums = sum(profiles[1:], profiles[0])
    return {
        "distance": [*range(REACH + 1), None],
        "voxels": voxels.long().tolist(),
        "noise_mean": [0.0, *NOISE_MEANS],
        "uncertainty": [(s / voxels).tolist() for s in sums],
    }


def _lists(curve: metrics.Reliability) -> dict[str, list[float]]:
    return {name: t.tolist() for name, t in curve._asdict().items()}


def _cuts(run: Run, dataset: Dataset, case: Case) -> tuple[tuple[figures.Plane, ...], Stack]:
    """What a report shows of a case; inferred anew, as all cases' volumes would not fit in memory."""
    loaded = load_case(case, ignore_label=dataset.ignore_label)
    assert loaded.label is not None
    result = infer(run, loaded.image[None])
    counted = (loaded.label != IGNORE)[0]  # elsewhere neither is drawn nor counted as wrong
    truth, label = (torch.where(counted, t, 0).numpy() for t in (loaded.label[0], result.label))
    image, uncertainty = loaded.image[0].numpy(), result.uncertainty[0].numpy()
    volumes = (image, truth, label, uncertainty, loaded.affine)
    return figures.planes(*volumes), stack(*volumes)


def _pick(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """The worst case, the worst and the median one, or `count` from the worst to the best in equal steps."""
    names = ranked(rows)
    end = len(names) - 1
    few = count < min(3, len(names))
    places = np.array([0, end / 2])[:count] if few else np.linspace(0, end, min(count, len(names)))
    return [names[i] for i in dict.fromkeys(np.rint(places).astype(int))]
