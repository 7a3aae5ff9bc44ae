"""sure compare: its statistics against NumPy, what it keeps and refuses, and the whole way from training to tables."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sure import compare as module
from sure.checkpoint import checkpoint_path
from sure.cli import main
from sure.compare import compare, markdown
from sure.config import TrainConfig
from sure.data import write_phantoms
from sure.errors import UserError

TINY = TrainConfig(
    patch_size=(16,), channels=(4, 8), folds=3, epochs=2, batch_size=2, good_model_step=0, validate_every=0
)
FLAGS = ["--patch-size", "16", "--channels", "4", "8", "--folds", "3", "--epochs", "2", "--batch-size", "2"]
FLAGS += ["--good-model-step", "0", "--validate-every", "0", "--no-progress"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", cases=6, shape=(16, 16, 16))


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    (folder / "strong.yaml").write_text("margin: 0.8\ngradient_weight: 9\n")
    out = folder / "out"
    report = compare(
        data, out, ["edl", "sure", str(folder / "strong.yaml")], TINY, folds=[0, 2], device="cpu", progress=False
    )
    return folder, out, report


def rows_of(out: Path, arm: str, fold: int) -> dict[str, dict[str, float]]:
    stored = json.loads((out / "robustness" / arm / f"fold-{fold}" / "robustness.json").read_text())
    return {row["name"]: row for row in stored["clean"]["cases"]}


def test_results_are_means_over_folds(compared):
    _, out, report = compared
    assert report["conditions"] == ["clean", *(f"gaussian_mean {m}" for m in (0.1, 0.3, 0.5, 0.7, 0.9))]
    assert report["settings"]["strong"]["margin"] == 0.8
    assert report["settings"]["strong"]["epochs"] == 2
    folds = [np.mean([row["dice"] for row in rows_of(out, "sure", k).values()]) for k in (0, 2)]
    (found,) = [r for r in report["results"] if (r["arm"], r["condition"], r["metric"]) == ("sure", "clean", "dice")]
    assert found["folds"] == pytest.approx(folds)
    assert found["mean"] == pytest.approx(np.mean(folds))
    assert found["std"] == pytest.approx(np.std(folds, ddof=1))


def test_all_arms_picture_the_cases_of_the_first(compared):
    _, out, _ = compared
    for k in (0, 2):
        folders = [out / "evaluations" / arm / f"fold-{k}" for arm in ("edl", "sure", "strong")]
        drawn = [list(json.loads((f / "metrics.json").read_text())["pictures"]["planes"]) for f in folders]
        assert drawn[0] == drawn[1] == drawn[2]
        dice = {name: row["dice"] for name, row in rows_of(out, "edl", k).items()}
        assert drawn[0] == sorted(dice, key=dice.get)  # from the worst on


def test_differences_are_paired_by_case(compared):
    _, out, report = compared
    per_fold = []
    for k in (0, 2):
        mine, theirs = rows_of(out, "strong", k), rows_of(out, "edl", k)
        assert mine.keys() == theirs.keys()
        per_fold.append([mine[c]["ece"] - theirs[c]["ece"] for c in mine])
    (found,) = [
        d for d in report["differences"] if (d["arm"], d["condition"], d["metric"]) == ("strong", "clean", "ece")
    ]
    assert found["against"] == "edl"
    assert found["folds"] == pytest.approx([np.mean(d) for d in per_fold])
    assert found["cases"] == sum(map(len, per_fold)) == 4
    assert found["low"] <= np.mean(np.concatenate(per_fold)) <= found["high"]
    assert not [d for d in report["differences"] if d["arm"] == "edl"]


def test_undefined_cases_are_left_out_of_pairs():
    tables = {
        "a": [{"clean": {"x": {"1": 1.0, "2": None, "3": 4.0}}}],
        "b": [{"clean": {"x": {"1": 2.0, "2": 7.0, "3": None}}}],
    }
    (found,) = module._differences(tables)
    assert (found["mean"], found["cases"], found["std"]) == (1.0, 1, None)
    tables["b"][0]["clean"]["x"] = dict.fromkeys("123")
    (found,) = module._differences(tables)
    assert (found["mean"], found["cases"]) == (None, 0)


def test_files(compared):
    _, out, report = compared
    stored = json.loads((out / "comparison.json").read_text())
    assert stored == report
    with (out / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report["results"])
    assert {line["arm"] for line in lines} == {"edl", "sure", "strong"}
    assert all(line["difference"] == "" for line in lines if line["arm"] == "edl")
    text = (out / "comparison.md").read_text()
    assert text == markdown(report)
    assert text.count("\n| dice |") == len(report["conditions"])
    assert "| strong - edl |" in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in out.iterdir()} == {
        "runs", "evaluations", "robustness", *(f"comparison.{end}" for end in ("json", "csv", "md", "png"))
    }  # fmt: skip


def test_what_is_there_is_used(compared, data, monkeypatch):
    folder, out, report = compared
    for name in ("train", "evaluate", "robustness"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
    arms = ["edl", "sure", str(folder / "strong.yaml")]
    again = compare(data, out, arms, TINY, folds=[0, 2], device="cpu", progress=False)
    assert again["results"] == report["results"]
    assert again["differences"] == report["differences"]
    one = compare(data, out, arms[:2], TINY, folds=[2], device="cpu", progress=False)
    assert all(r["std"] is None for r in one["results"])


def test_an_interrupted_run_is_resumed(data, tmp_path, monkeypatch):
    arms = ["edl", "dice_ce"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(data, tmp_path / "out", arms, TINY, folds=[1], device="cpu", progress=False)
    run = tmp_path / "out/runs/edl/fold-1"
    checkpoint_path(run, "final").unlink()  # as if it had stopped after the last epoch
    report = compare(data, tmp_path / "out", arms, TINY, folds=[1], device="cpu", progress=False)
    assert {r["arm"] for r in report["results"]} == set(arms)


def test_other_settings_are_refused_before_any_work(compared, data):
    _, out, _ = compared
    before = (out / "comparison.json").stat().st_mtime_ns
    with pytest.raises(
        UserError, match=r"fold-0: made with other settings: lr was 0.001, is 0.01; choose another --out"
    ):
        compare(data, out, ["edl", "sure"], replace(TINY, lr=0.01), folds=[0], device="cpu", progress=False)
    assert (out / "comparison.json").stat().st_mtime_ns == before


def test_other_data_are_refused_before_any_work(compared, tmp_path):
    _, out, _ = compared
    other = write_phantoms(tmp_path / "phantoms", cases=6, shape=(16, 16, 16), seed=5)
    with pytest.raises(
        UserError, match=r"edl/fold-0: trained on other data \(.*\) than .* holds; choose another --out"
    ):
        compare(other, out, ["edl", "sure"], TINY, folds=[0], device="cpu", progress=False)


def test_scores_of_other_weights_are_made_anew(compared, data, tmp_path):
    _, out, report = compared
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/runs")
    settings = replace(TINY, lr=0.02)
    again = compare(data, tmp_path / "out", ["edl", "sure"], settings, folds=[0], device="cpu", progress=False)
    fresh = compare(data, tmp_path / "new", ["edl", "sure"], settings, folds=[0], device="cpu", progress=False)
    assert again["results"] == fresh["results"]
    assert again["results"][0]["folds"] != report["results"][0]["folds"][:1]
    for name in ("edl", "sure"):
        stored = [
            json.loads((tmp_path / x / f"evaluations/{name}/fold-0/metrics.json").read_text()) for x in ("out", "new")
        ]
        assert stored[0]["cases"] == stored[1]["cases"]


def test_a_preset_arm_brings_its_objective_alone(tmp_path):
    """What all arms share stays; times are shares of the epochs."""
    found = module._arms(["edl", "sure-acdc", "prius-whs"], replace(TINY, good_model_step=None, epochs=10))
    acdc, whs = found["sure-acdc"], found["prius-whs"]
    for key in ("spatial_dims", "patch_size", "channels", "folds", "epochs", "batch_size", "lr", "augment", "norm"):
        assert getattr(acdc, key) == getattr(whs, key) == getattr(found["edl"], key)
    assert (acdc.ranking, acdc.noise, acdc.annealing_steps, acdc.good_model_step) == ("exact", "patches", 2, 3)
    assert whs.good_model_step == 5
    assert whs.within_class
    (tmp_path / "split.yaml").write_text("seed: 3\n")
    with pytest.raises(UserError, match=r"split.yaml: sets seed, which decide the cases that all arms are to share"):
        module._arms(["edl", str(tmp_path / "split.yaml")], TINY)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms", "edl"], "arms: expected at least two, got 1"),
        (["--arms", "edl", "edl"], "arms: expected different names, got edl twice"),
        (["--arms", "edl", "surr"], "arms: expected edl, sure, dice_ce, prius-acdc"),
        (["--arms", "edl", "sure", "--run-folds", "3"], r"folds: expected different numbers from 0 to 2, got [3]"),
        (["--arms", "edl", "sure", "--run-folds", "1", "1"], "folds: expected different numbers"),
    ],
)
def test_mistakes(args, message, data, tmp_path, capsys):
    assert main(["compare", str(data), "--out", str(tmp_path / "x"), *args, *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sure: ")
    assert message in error
    assert not (tmp_path / "x").exists()


def test_command(compared, data, capsys):
    _, out, _ = compared
    arguments = ["--arms", "edl", "sure", "--run-folds", "0", "2", "--device", "cpu"]
    assert main(["compare", str(data), "--out", str(out), *arguments, *FLAGS]) == 0
    assert "| sure - edl |" in capsys.readouterr().out
