"""Evaluation: scores against independent libraries, files that are whole, data that is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.metrics import f1_score
from tiny_run import AFFINE, CLASSES, SHAPE, make_run, write_case, write_data

import sure.evaluate
from sure.data import IGNORE, Case, discover, load_case
from sure.errors import UserError
from sure.evaluate import evaluate
from sure.inference import infer
from sure.scoring import CaseScorer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def loaded(monkeypatch, run):
    monkeypatch.setattr(sure.evaluate, "load_run", lambda path, **_: run)


@pytest.fixture(scope="module")
def scored(data, run):
    """One case, what the run says about it, and its scores."""
    case = load_case(Case("a", (data / "images/case_0.nii.gz",), data / "labels/case_0.nii.gz"))
    result = infer(run, case.image[None])
    scored = CaseScorer(run, case).score(case.image, result)
    return case, result, scored.values, tuple(t.numpy() for t in scored.boundary)


def surface_distances(a: np.ndarray, b: np.ndarray, spacing) -> np.ndarray:
    """From the surface voxels of a to the nearest of b."""
    edges = [m & ~ndimage.binary_erosion(m) for m in (a, b)]
    return ndimage.distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]


def test_dice_and_hd95(scored):
    case, result, row, _ = scored
    truth, label = case.label[0].numpy(), result.label.numpy()
    for k, name in enumerate(CLASSES[1:], 1):
        assert row[f"dice/{name}"] == pytest.approx(f1_score(truth.ravel() == k, label.ravel() == k), abs=1e-6)
        one, other = label == k, truth == k
        expected = max(
            np.percentile(surface_distances(a, b, case.spacing), 95) for a, b in ((one, other), (other, one))
        )
        assert row[f"hd95/{name}"] == pytest.approx(expected, rel=1e-5)
    assert row["dice"] == pytest.approx(np.mean([row[f"dice/{n}"] for n in CLASSES[1:]]))
    assert row["error_rate"] == pytest.approx((truth != label).mean(), abs=1e-6)


def test_uncertainty_by_region(scored):
    case, result, row, (gradient, on_boundary) = scored
    truth = case.label[0].numpy()
    edges = np.zeros(truth.shape, bool)
    for k in (1, 2):
        inside = (truth == k).astype(np.uint8)
        edges |= ndimage.maximum_filter(inside, 3) != ndimage.minimum_filter(inside, 3)
    distance = ndimage.distance_transform_edt(~edges)
    u = result.uncertainty[0].double().numpy()
    assert row["uncertainty_boundary"] == pytest.approx(u[distance <= 1].mean(), rel=1e-6)
    far = u[distance > 4]
    assert row["uncertainty_far"] == pytest.approx(far.mean(), rel=1e-6, nan_ok=True)
    image = case.image[0].double().numpy()
    magnitude = np.sqrt(sum((ndimage.sobel(image, axis, mode="reflect") / 32) ** 2 for axis in range(3)))
    expected = stats.spearmanr(u[distance <= 1], magnitude[distance <= 1]).statistic
    assert row["ucc_g"] == pytest.approx(expected, abs=1e-4)
    assert row["ucc_g"] == pytest.approx(stats.spearmanr(on_boundary, gradient).statistic, abs=1e-9)
    assert 0 <= row["ur_g"] <= 1


def test_ignored_voxels_count_nowhere(data, run):
    case = load_case(Case("a", (data / "images/case_0.nii.gz",), data / "labels/case_0.nii.gz"))
    result = infer(run, case.image[None])
    case.label[:, :, :, 6:] = IGNORE
    row, _, _, (gradient, _) = CaseScorer(run, case).score(case.image, result)
    truth, label = case.label[0, :, :, :6].numpy(), result.label[:, :, :6].numpy()
    assert row["error_rate"] == pytest.approx((truth != label).mean(), abs=1e-6)
    assert row["dice/core"] == pytest.approx(f1_score(truth.ravel() == 2, label.ravel() == 2), abs=1e-6)
    assert len(gradient) <= truth.size


def test_undefined_is_nan(data, run):
    case = load_case(Case("a", (data / "images/case_0.nii.gz",), data / "labels/case_0.nii.gz"))
    result = infer(run, case.image[None])
    case.label.zero_()
    certain = torch.zeros_like(result.probability)
    certain[0] = 1
    nothing = result._replace(label=torch.zeros_like(result.label), probability=certain)
    row, undefined, _, (gradient, _) = CaseScorer(run, case).score(case.image, nothing)
    for key in ("dice", "hd95", "assd", "dice/core", "ueo", "auroc", "ucc_g", "ur_g", "uncertainty_boundary"):
        assert math.isnan(row[key]), key
    assert undefined.keys() == {key for key, value in row.items() if math.isnan(value)}
    assert undefined["dice/core"] == "neither prediction nor truth has the class"
    assert undefined["ueo"] == "nothing that counts is wrong"
    assert row["error_rate"] == 0
    assert len(gradient) == 0


@pytest.fixture(scope="module")
def evaluated(data, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "eval"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sure.evaluate, "load_run", lambda path, **_: run)
        report = evaluate(run.path, data, out, pictures=0, progress=False)
    return out, report


def test_files(evaluated):
    out, report = evaluated
    assert sorted(p.name for p in out.parent.iterdir()) == ["eval"]
    assert sorted(p.name for p in out.iterdir()) == ["metrics.csv", "metrics.json", "pictures"]
    text = (out / "metrics.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert stored == report
    assert [row["name"] for row in stored["cases"]] == ["case_0", "case_2"]
    assert stored["cases_from"] == "held-out"
    for key in ("run", "checkpoint", "loss", "dataset", "date", "versions"):
        assert stored[key]
    dice = [row["dice"] for row in stored["cases"]]
    assert stored["summary"]["dice"] == {
        "mean": pytest.approx(np.mean(dice)),
        "std": pytest.approx(np.std(dice, ddof=1)),
        "n": 2,
        "ci": stored["summary"]["dice"]["ci"],
    }
    low, high = stored["summary"]["dice"]["ci"]  # two cases: the interval of their mean spans both
    assert (low, high) == (pytest.approx(min(dice)), pytest.approx(max(dice)))
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["case_0", "case_2"]
    assert float(rows[1]["dice"]) == dice[1]
    assert list(stored["reliability_per_class"]) == list(CLASSES)
    for curve in (stored["reliability"], *stored["reliability_per_class"].values()):
        assert sum(curve["voxels"]) == 2 * math.prod(SHAPE)
        gaps = [
            n * abs(p - y) for p, y, n in zip(curve["confidence"], curve["accuracy"], curve["voxels"], strict=True) if n
        ]
        assert 0 < sum(gaps) / (2 * math.prod(SHAPE)) < 1
    assert sum(gaps) / (2 * math.prod(SHAPE)) == pytest.approx(stored["pooled"]["ece/core"])
    pictures = stored["pictures"]
    for name in (*pictures["overlays"].values(), pictures["reliability"], pictures["gradient"]):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert list(pictures["overlays"]) == sorted(pictures["overlays"], key=lambda n: -dice[n == "case_2"])


def test_earlier_evaluation_is_replaced(data, run, evaluated, tmp_path):
    out = tmp_path / "eval"
    evaluate(run.path, data, out, cases="all", pictures=0, progress=False)
    assert len(json.loads((out / "metrics.json").read_text())["cases"]) == 4
    report = evaluate(run.path, data, out, pictures=["case_2"], progress=False)
    assert len(report["cases"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["eval"]
    assert sorted(p.name for p in (out / "pictures").iterdir()) == [
        "case_case_2.npz",
        "case_case_2.png",
        "gradient.npz",
        "gradient.png",
        "reliability.png",
    ]
    assert report["summary"] == evaluated[1]["summary"]


@pytest.mark.parametrize("content", ["notes.txt", "metrics.json"])
def test_other_folders_are_left_alone(data, run, tmp_path, content):
    (tmp_path / content).write_text("{}")
    with pytest.raises(UserError, match="holds something else than an earlier evaluation"):
        evaluate(run.path, data, tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == [content]


def test_evaluation_with_a_foreign_file_is_left_alone(data, run, tmp_path):
    out = tmp_path / "eval"
    evaluate(run.path, data, out, pictures=0, progress=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        evaluate(run.path, data, out, pictures=0, progress=False)
    assert (out / "notes.txt").read_text() == "mine"


def test_failure_leaves_nothing(data, run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no disk")

    monkeypatch.setattr(sure.evaluate.figures, "png", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        evaluate(run.path, data, tmp_path / "eval", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_external_data_is_used_whole(run, tmp_path):
    root = tmp_path / "data"
    write_case(root, "stranger", 1)
    write_case(root, "stranger_b", 2)
    report = evaluate(run.path, root, tmp_path / "eval", pictures=0, progress=False)
    assert len(report["cases"]) == 2
    assert report["cases_from"].startswith("all")


def test_missing_held_out_case_is_named(run, tmp_path):
    root = write_data(tmp_path / "data", 2)
    report = evaluate(run.path, root, tmp_path / "eval", pictures=0, progress=False)
    assert [row["name"] for row in report["cases"]] == ["case_0"]
    assert report["cases_missing"] == ["case_2"]
    assert report["summary"]["dice"]["std"] is None


def test_what_is_scored_is_told(run, tmp_path, capsys):
    root = write_data(tmp_path / "data", 2)
    evaluate(run.path, root, tmp_path / "eval", pictures=0)
    told = f"{root}: 1 of 2 cases (held-out); left out: case_1; held out by the run, but not here: case_2"
    assert told in capsys.readouterr().err.splitlines()


def test_classes_under_other_numbers_are_refused(run, tmp_path, capsys):
    root = write_data(tmp_path / "data", 3)
    for old, new in (("images", "imagesTr"), ("labels", "labelsTr")):
        (root / old).rename(root / new)
    names = [f"case_{i}" for i in range(3)]
    listed = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names]

    def declare(*classes):
        labels = {str(i): name for i, name in enumerate(classes)}
        (root / "dataset.json").write_text(json.dumps({"training": listed, "labels": labels}))

    declare("background", "core", "shell")
    with pytest.raises(UserError, match=r"found other numbers: core is 1, 2 in the run; shell is 2, 1 in the run"):
        evaluate(run.path, root, tmp_path / "eval", pictures=0, progress=False)
    declare("background", "shell", "centre")
    evaluate(run.path, root, tmp_path / "eval", pictures=0)
    assert "; classes go by number: centre as core" in capsys.readouterr().err


def test_ignored_voxels_are_drawn_as_background(run, tmp_path):
    _, label = write_case(tmp_path / "data", "case_0", 0)
    stored = nib.load(label)
    values = np.asarray(stored.dataobj).copy()
    values[:, :10] = IGNORE
    nib.save(nib.Nifti1Image(values, stored.affine), label)
    dataset = dataclasses.replace(discover(tmp_path / "data"), ignore_label=IGNORE)
    _, slices = sure.evaluate._cuts(run, dataset, dataset.cases[0])
    case = load_case(dataset.cases[0], ignore_label=IGNORE)
    result = infer(run, case.image[None])
    wrong = (result.label != case.label[0]) & (case.label[0] != IGNORE)
    assert bool(((result.label > 0) & (case.label[0] == IGNORE)).any())
    assert int((slices.truth != slices.prediction).sum()) == int(wrong.sum())


def test_flat_images_of_a_3d_run_are_named(run, tmp_path):
    root = write_data(tmp_path / "data", 1)
    for folder in ("images", "labels"):
        path = root / folder / "case_0.nii.gz"
        flat = np.asarray(nib.load(path).dataobj)[..., 3]
        nib.save(nib.Nifti1Image(flat, AFFINE), path)
    with pytest.raises(UserError, match=r"case_0 .*expected a 3D image for a 3D run.*images/case_0\.nii\.gz"):
        evaluate(run.path, root, tmp_path / "eval", pictures=0, progress=False)


def test_faulty_data_is_refused(run, tmp_path):
    root = write_data(tmp_path / "data", 3)
    label = np.full(SHAPE, 7, np.uint8)
    nib.save(nib.Nifti1Image(label, AFFINE), root / "labels/case_0.nii.gz")
    (root / "labels/case_2.nii.gz").unlink()
    with pytest.raises(UserError) as raised:
        evaluate(run.path, root, tmp_path / "eval", pictures=0, progress=False)
    assert "labels out of range" in str(raised.value)
    assert "image without label" in str(raised.value)
    assert not (tmp_path / "eval").exists()


def test_bad_arguments(data, run, tmp_path):
    with pytest.raises(UserError, match="cases: expected held-out or all, got 'some'"):
        evaluate(run.path, data, tmp_path / "eval", cases="some", progress=False)
    with pytest.raises(UserError, match="pictures: expected names of evaluated cases, got case_1"):
        evaluate(run.path, data, tmp_path / "eval", pictures=["case_1"], progress=False)


@pytest.mark.parametrize("loss", ["edl", "dice_ce"])
def test_2d_run_on_volumes(data, tmp_path, monkeypatch, loss):
    flat = make_run(tmp_path / "run", dims=2, loss=loss)
    monkeypatch.setattr(sure.evaluate, "load_run", lambda path, **_: flat)
    report = evaluate(flat.path, data, tmp_path / "eval", pictures=1, progress=False)
    case = load_case(Case("a", (data / "images/case_0.nii.gz",), data / "labels/case_0.nii.gz"))
    edges = np.zeros(SHAPE, bool)
    for z in range(SHAPE[2]):  # boundaries are those of the slices
        for k in (1, 2):
            inside = (case.label[0, :, :, z] == k).numpy().astype(np.uint8)
            edges[:, :, z] |= ndimage.maximum_filter(inside, 3) != ndimage.minimum_filter(inside, 3)
    near = np.stack(
        [
            ndimage.distance_transform_edt(~edges[..., z]) <= 1 if edges[..., z].any() else edges[..., z]
            for z in range(SHAPE[2])
        ],
        -1,
    )
    u = infer(flat, case.image[None]).uncertainty[0].double().numpy()
    assert report["cases"][0]["uncertainty_boundary"] == pytest.approx(u[near].mean(), rel=1e-6)
