"""The comparison page: whole, self-contained, escaped, with the numbers of its evaluations."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
import torch
from markupsafe import escape
from matplotlib import _pylab_helpers
from PIL import Image
from scipy.stats import bootstrap
from tiny_run import CLASSES, make_run, write_data

import sure.evaluate
from sure.errors import UserError
from sure.report import figures, glossary, slices, write_report
from sure.report import page as report_page
from sure_kernels.metrics import Reliability

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, text and links, and fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """Of two untrained runs, on the same cases."""
    root = tmp_path_factory.mktemp("report")
    data = write_data(root / "data", 3)
    for seed, loss in enumerate(("edl", "sure")):
        run = make_run(root / loss, loss=loss, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sure.evaluate, "load_run", lambda path, run=run, **_: run)
            sure.evaluate.evaluate(run.path, data, root / f"eval_{loss}", progress=False)
    return [root / "eval_edl", root / "eval_sure"]


@pytest.fixture(scope="module")
def written(evaluations, tmp_path_factory):
    return write_report(evaluations, tmp_path_factory.mktemp("page") / "sub" / "report.html")


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are laid out but not drawn: for tests of all else on a page."""
    monkeypatch.setattr(figures, "png", lambda figure: b"\x89PNG")


def test_page_is_whole_and_self_contained(written):
    out = written
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    html = out.read_text(encoding="utf-8")
    assert len(html) < 10_000_000
    page = Page(html)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    # overlays of the shared cases; reliability and risk-coverage; gradient of each run, distance and noise
    assert len(images) == 2 + 2 + 2 + 2
    assert all(src.startswith("data:image/png;base64,") for src in images)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe")]
    assert not [attrs for tag, attrs in page.tags if tag == "script" and "src" in attrs]
    assert not re.search(r"https?://|url\(|import\(|fetch\(|XMLHttpRequest", html)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_numbers_are_the_evaluations(evaluations, written):
    page = Page(written.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    stored = [json.loads((folder / "metrics.json").read_text()) for folder in evaluations]
    dice = [s["summary"]["dice"]["mean"] for s in stored]
    gaps = [b["dice"] - a["dice"] for a, b in zip(*(s["cases"] for s in stored), strict=True)]
    for value in (*dice, abs(np.mean(gaps))):
        assert f"{value:.3f}" in text
    for s in stored:
        low, high = s["summary"]["dice"]["ci"]
        assert f"{low:.3f} to {high:.3f}" in text
    assert "EDL" in text
    assert "SURE − EDL" in text
    assert "2 held-out cases that took no part in training" in text
    assert "With so few cases these intervals are too narrow" in text
    for s in stored:
        assert s["date"] in text
        assert s["run"] in text


def test_html_is_escaped(evaluations, tmp_path, undrawn):
    folder = tmp_path / "eval"
    shutil.copytree(evaluations[0], folder)
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.replace("core", "<script>alert(1)</script>"))
    html = write_report([folder], tmp_path / "r.html", title="<b>bold & brave</b>").read_text(encoding="utf-8")
    page = Page(html)
    assert "<script>alert" not in html
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "cases"}, {}]
    assert "<b>bold & brave</b>" in page.text
    assert "SURE −" not in page.text  # one run alone has no difference
    assert "paired" not in page.text


def test_same_loss_is_told_apart_by_folder(evaluations, tmp_path, undrawn):
    shutil.copytree(evaluations[0], tmp_path / "other")
    stored = json.loads((tmp_path / "other/metrics.json").read_text())
    stored["cases"].append(stored["cases"][0] | {"name": "case_9"})
    (tmp_path / "other/metrics.json").write_text(json.dumps(stored))
    text = Page(write_report([evaluations[0], tmp_path / "other"], tmp_path / "r.html").read_text()).text
    assert "EDL (eval_edl)" in text
    assert "do not cover the same cases" in text
    assert "EDL (other)" in text


def test_errors(evaluations, tmp_path):
    with pytest.raises(UserError, match="expected at least one folder that sure evaluate wrote"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(UserError, match=r"expected an evaluation with metrics\.json"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="not written by sure evaluate"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UserError, match="twice"):
        write_report([evaluations[0], evaluations[0]], tmp_path / "r.html")
    with pytest.raises(UserError, match="expected a file name, found a folder"):
        write_report(evaluations, tmp_path)
    shutil.copytree(evaluations[0], tmp_path / "torn")
    (tmp_path / "torn/pictures/gradient.npz").unlink()
    with pytest.raises(UserError, match=r"incomplete evaluation, pictures/gradient\.npz is missing"):
        write_report([tmp_path / "torn"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def edited(folder, source, **changes):
    """A copy of an evaluation with other values in its metrics.json; None takes a field out."""
    shutil.copytree(source, folder)
    stored = json.loads((folder / "metrics.json").read_text()) | changes
    stored = {key: value for key, value in stored.items() if value is not None}
    (folder / "metrics.json").write_text(json.dumps(stored))
    return folder


def row_of(folders, label: str) -> dict:
    """The first row of the tables that is called `label`."""
    return next(row for row in report_page._rows(report_page._load(folders)) if row["label"] == label)


@pytest.mark.parametrize(
    ("gaps", "mark"),
    [
        ((0.1, 0.2, 0.15, 0.11), "better"),
        ((-0.1, -0.2, -0.15, -0.11), "worse"),
        ((0.3, -0.1, 0.2, -0.05), ""),  # the mean is far from 0, its interval holds it
        ((1e-5, 1e-5, 1e-5, 1e-5), ""),  # printed as 0
        ((1e-4, 1e-4, 3e-3, 3e-3), ""),  # an end of the interval is printed as 0
    ],
)
def test_marks_only_where_the_paired_interval_excludes_0(evaluations, tmp_path, gaps, mark):
    stored = json.loads((evaluations[0] / "metrics.json").read_text())
    row = stored["cases"][0]
    cases = [row | {"name": f"case_{i}", "dice": 0.5 + i / 100} for i in (0, 2, 3, 4)]
    others = [case | {"dice": case["dice"] + gap} for case, gap in zip(cases, gaps, strict=True)]
    folders = [
        edited(tmp_path / "a", evaluations[0], cases=cases),
        edited(tmp_path / "b", evaluations[1], cases=others),
    ]
    cell = row_of(folders, "Dice")["cells"][1]
    assert cell["difference"] == f"{np.mean(gaps):+.3f}".replace("-", "−")
    assert cell["verdict"] == mark
    # `rng=` since SciPy 1.15.
    low, high = bootstrap((gaps,), np.mean, method="percentile", random_state=1).confidence_interval
    assert mark == "" or low > 0 or high < 0


def test_evaluations_of_older_versions(evaluations, tmp_path, undrawn):
    stored = json.loads((evaluations[0] / "metrics.json").read_text())
    summary = {key: {k: v for k, v in entry.items() if k != "ci"} for key, entry in stored["summary"].items()}
    changes = {"summary": summary, "risk_coverage": None, "by_distance": None, "undefined": None, "cases_missing": None}
    old = edited(tmp_path / "old", evaluations[0], **changes)
    low, high = stored["summary"]["dice"]["ci"]
    assert row_of([old], "Dice")["cells"][0]["ci"] == f"{low:.3f} to {high:.3f}"  # from the cases
    runs = report_page._load([old])
    assert len(report_page._calibration(runs)) == len(report_page._relation(runs)) == 1
    html = write_report([old, evaluations[1]], tmp_path / "r.html").read_text()
    assert html.count("Not measured for EDL.") == 3
    torn = edited(tmp_path / "torn", evaluations[0], reliability=None)
    with pytest.raises(UserError, match=r"torn/metrics.json: reliability missing; run sure evaluate anew"):
        write_report([torn], tmp_path / "no.html")


def test_sweeps_stand_beside_their_runs(evaluations, tmp_path, undrawn):
    stored = json.loads((evaluations[1] / "metrics.json").read_text())
    levels = [{"level": level, "summary": stored["summary"]} for level in (0.1, 0.9)]
    sweep = {
        "kind": "sure robustness",
        "run": {"path": stored["run"], "checkpoint": stored["checkpoint"]},
        "clean": {"summary": stored["summary"]},
        "corruptions": [
            {"name": "gaussian_mean", "title": "Noise & more", "parameter": "mean", "unit": "SD", "levels": levels}
        ],
        "noise_response": {"gaussian_mean": {"levels": [0.0, 0.1, 0.9]}},
    }
    folder = tmp_path / "rob"
    folder.mkdir()
    (folder / "robustness.json").write_text(json.dumps(sweep))
    page = Page(write_report([folder, *evaluations], tmp_path / "r.html").read_text())
    assert "Noise & more" in page.text
    assert "Not measured for EDL." in page.text
    alts = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert "Dice against mean (SD), SURE" in alts
    with pytest.raises(UserError, match=r"rob: a sweep of .*, checkpoint final, of which no evaluation was given"):
        write_report([folder, evaluations[0]], tmp_path / "no.html")
    shutil.copytree(folder, tmp_path / "again")
    with pytest.raises(UserError, match="again: a second sweep of"):
        write_report([*evaluations, folder, tmp_path / "again"], tmp_path / "no.html")
    with pytest.raises(UserError, match="expected at least one folder that sure evaluate wrote"):
        write_report([folder], tmp_path / "no.html")
    for key, value in (("weights", "other"), ("epoch", stored["epoch"] + 1)):
        trained_again = sweep | {"run": sweep["run"] | {key: value}}
        (folder / "robustness.json").write_text(json.dumps(trained_again))
        with pytest.raises(UserError, match="of which no evaluation was given"):
            write_report([folder, *evaluations], tmp_path / "no.html")


def test_severity_curves_start_at_the_clean_image(evaluations):
    stored = json.loads((evaluations[0] / "metrics.json").read_text())
    entry = {"mean": 0.25, "ci": [0.2, None]}
    sweep = {
        "clean": {"summary": {"dice": {"mean": 0.5, "ci": [0.4, 0.6]}}},
        "noise_response": {"contrast": {"levels": [1.0, 2.0]}},
    }
    run = report_page._Evaluation(evaluations[0], "EDL", stored, stored["summary"], sweep)
    corruption = {"name": "contrast", "levels": [{"level": 2.0, "summary": {"dice": entry}}]}
    curve = report_page._curve(run, corruption, "dice")
    assert curve.levels == [1.0, 2.0]
    np.testing.assert_array_equal(curve.mean, [0.5, 0.25])
    np.testing.assert_array_equal(curve.high, [0.6, np.nan])
    assert np.isnan(report_page._curve(run, corruption, "ece").mean).all()


def test_numbers_are_printed_as_they_are_read():
    assert report_page._number(-0.0004, 3, sign=True) == "+0.000"
    assert report_page._number(-0.0006, 3) == "−0.001"
    assert report_page._number(float("nan"), 3) == report_page._number(None, 3) == "–"
    assert report_page._range((None, None), 2) == ""
    assert report_page._range((-1, 2), 1, sign=True) == "−1.0 to +2.0"


def test_every_metric_of_an_evaluation_is_explained(evaluations, written):
    stored = json.loads((evaluations[0] / "metrics.json").read_text())
    names = {key.partition("/")[0] for key in stored["summary"]}
    assert names == set(glossary.METRICS)
    html = written.read_text()
    for metric in glossary.METRICS.values():
        assert str(escape(metric.text)) in html


def test_metrics_of_other_versions_are_shown(evaluations, tmp_path):
    stored = json.loads((evaluations[0] / "metrics.json").read_text())
    new = {"novelty": {"mean": 0.125, "std": 0.0, "n": 2, "ci": [0.1, 0.15]}}
    folder = edited(tmp_path / "new", evaluations[0], summary=stored["summary"] | new)
    assert row_of([folder], "novelty")["cells"][0]["mean"] == "0.1250"


def test_planes_cut_the_centre_and_keep_proportions():
    shape = (10, 12, 14)
    truth = np.zeros(shape, np.uint8)
    truth[2:5, 6:9, 9:12] = 1
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])  # x runs to the left and is turned
    axial, coronal, sagittal = figures.planes(image, truth, truth, image / image.max(), affine)
    np.testing.assert_array_equal(axial.image, image[::-1, :, 10].T)
    np.testing.assert_array_equal(coronal.image, image[::-1, 7, :].T)
    np.testing.assert_array_equal(sagittal.image, image[3].T)
    assert [p.size for p in (axial, coronal, sagittal)] == [(10.0, 24.0), (10.0, 42.0), (24.0, 42.0)]


def stored_cases(html: str) -> dict:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="cases">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


def decoded(uri: str, case: dict) -> np.ndarray:
    """(slices, height, width) from a sheet of slices."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))
    h, w, columns = case["height"], case["width"], case["columns"]
    places = [(i // columns * h, i % columns * w) for i in range(case["slices"])]
    return np.stack([sheet[y : y + h, x : x + w] for y, x in places])


def test_viewer_holds_every_slice_of_every_run(evaluations, written):
    page = stored_cases(written.read_text())
    folders = dict(zip(("EDL", "SURE"), evaluations, strict=True))
    names = [json.loads((folder / "metrics.json").read_text())["pictures"]["planes"] for folder in evaluations]
    assert len(page["cases"]) == len(names[0]) == 2
    dice = {r["name"]: r["dice"] for r in json.loads((evaluations[0] / "metrics.json").read_text())["cases"]}
    for name, case in zip(sorted(dice, key=dice.get), page["cases"], strict=True):  # the worst first
        assert [run["name"] for run in case["runs"]] == list(folders)
        assert not case["reduced"]
        for run in case["runs"]:
            stored = figures.load_slices(folders[run["name"]] / f"pictures/case_{name}.npz")
            assert stored.image.shape == (case["slices"], case["height"], case["width"])
            np.testing.assert_array_equal(decoded(case["image"], case), stored.image)
            np.testing.assert_array_equal(decoded(case["truth"], case), stored.truth)
            np.testing.assert_array_equal(decoded(run["prediction"], case), stored.prediction)
            np.testing.assert_array_equal(decoded(run["uncertainty"], case), stored.uncertainty)
        truth = nib.load(evaluations[0].parent / f"data/labels/{name}.nii.gz")
        right = nib.as_closest_canonical(truth).get_fdata()
        # voxels of 2.5 mm lie along the axis that is nearly superior: axial slices, anterior up
        assert case["view"] == "axial"
        np.testing.assert_array_equal(decoded(case["truth"], case), right.transpose(2, 1, 0)[:, ::-1])
        assert case["start"] == (right > 0).sum((0, 1)).argmax()


def test_slices_across_the_thickest_voxels():
    shape = (6, 5, 4)
    values = np.arange(120, dtype=np.float32).reshape(shape)
    label = np.zeros(shape, np.uint8)
    label[2, 1, 3] = 1
    cut = slices.stack(values, label, label, values / 119, np.diag([1.0, 4.0, 1.0, 1.0]))
    assert (cut.view, cut.size, cut.image.shape) == ("coronal", (6.0, 4.0), (5, 4, 6))
    assert cut.fullest == 1
    assert cut.truth[1, 0, 2] == 1  # superior is up
    assert slices.stack(values[0], label[0], label[0], values[0] / 119, np.eye(4)).view == ""
    large = np.zeros((300, 10, 200), np.float32)
    cut = slices.stack(large, large, large, large, np.eye(4))
    assert cut.image.shape == (67, 5, 150)
    assert cut.size == (300.0, 10.0)
    assert cut.reduced
    with io.BytesIO() as file:
        np.savez(file, **slices.arrays_of(cut))
        file.seek(0)
        assert slices.viewer({"A": slices.stack_of(np.load(file))}, 10**7)["reduced"]


def test_arms_of_a_comparison_are_told_apart_by_their_folders(evaluations, tmp_path):
    folders = [edited(tmp_path / arm / "fold-0", evaluations[0]) for arm in ("weak", "strong")]
    names = [run.name for run in report_page._load(folders)]
    assert names == ["EDL (weak/fold-0)", "EDL (strong/fold-0)"]


def test_viewer_shrinks_to_the_room_there_is():
    rng = np.random.default_rng(0)
    noise = rng.random((40, 40, 20)).astype(np.float32)
    truth = np.zeros(noise.shape, np.uint8)
    truth[20:, 10:30, 7] = 1
    cut = slices.stack(noise, truth, truth, noise, np.eye(4))
    whole = slices.viewer({"A": cut}, 10**7)
    assert (whole["slices"], whole["width"], whole["reduced"]) == (20, 40, False)
    size = len(json.dumps(whole))
    small = slices.viewer({"A": cut}, size // 5)
    assert small["reduced"]
    assert len(json.dumps(small)) < size // 4
    assert decoded(small["truth"], small)[small["start"]].any()  # the fullest slice is kept
    assert slices.viewer({"A": cut}, 100) is None


def test_page_is_bounded(evaluations, tmp_path, monkeypatch, undrawn):
    size = write_report(evaluations, tmp_path / "r.html").stat().st_size
    monkeypatch.setattr(report_page, "LARGEST", size - 1)
    monkeypatch.setattr(report_page, "MARGIN", 20_000)
    smaller = write_report(evaluations, tmp_path / "s.html")
    assert smaller.stat().st_size < size
    monkeypatch.setattr(report_page, "LARGEST", 10_000)
    with pytest.raises(UserError, match=r"t\.html: the page would take .* MB of at most 0\.01: give fewer evaluations"):
        write_report(evaluations, tmp_path / "t.html")
    assert not (tmp_path / "t.html").exists()


def test_only_shared_cases_are_set_side_by_side(evaluations, tmp_path):
    stored = json.loads((evaluations[1] / "metrics.json").read_text())
    pictures = stored["pictures"] | {"planes": {"case_2": stored["pictures"]["planes"]["case_2"]}}
    one = edited(tmp_path / "one", evaluations[1], pictures=pictures)
    runs = report_page._load([evaluations[0], one])
    assert report_page._unshared(runs) == ["case_0"]
    cases, _ = report_page._cases(runs, 10**7)
    assert [case["name"] for case in cases] == ["case_2"]
    assert [run["name"] for run in cases[0]["viewer"]["runs"]] == ["EDL", "SURE"]
    other = dataclasses.replace(figures.load_slices(one / pictures["planes"]["case_2"]), truth=np.ones((1, 1, 1)))
    with pytest.raises(UserError, match="case_2 of SURE has another truth than that of EDL"):
        report_page._viewer(
            "case_2", {"EDL": figures.load_slices(one / pictures["planes"]["case_2"]), "SURE": other}, 9
        )


@pytest.mark.parametrize(("count", "expected"), [(1, "a"), (2, "ac"), (3, "ace"), (9, "abcdef"), (0, "")])
def test_pictured_cases_from_the_worst_on(count, expected):
    rows = [
        {"name": name, "dice": value} for name, value in zip("fedcba", (np.nan, 0.9, 0.8, 0.7, 0.6, 0.5), strict=True)
    ]
    assert sure.evaluate._pick(rows[1:], count) == list(expected if count < 9 else "abcde")
    assert sure.evaluate._pick(rows, 9)[-1] == "f"
    assert sure.evaluate._pick(rows[-2:], 2) == ["a", "b"]


def test_planes_follow_permuted_axes():
    image = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    affine = np.array([[0, 0, 3.0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])  # axes: A, S, R
    axial, *_ = figures.planes(image, label, label, image, affine)
    assert axial.size == (18.0, 4.0)
    np.testing.assert_array_equal(axial.image, image[:, 2, :])


def test_stored_planes_come_back(tmp_path):
    image = np.random.default_rng(0).normal(1e6, 1e5, (9, 8)).astype(np.float32)
    truth = (image > 1e6).astype(np.uint8)
    cuts = figures.planes(image, truth, truth, truth * np.float32(0.5), np.eye(4))
    figures.save_planes(tmp_path / "p.npz", cuts)
    (back,) = figures.load_planes(tmp_path / "p.npz")
    np.testing.assert_array_equal(back.truth, cuts[0].truth)
    np.testing.assert_allclose(back.uncertainty, cuts[0].uncertainty)
    assert back.size == cuts[0].size
    assert np.corrcoef(back.image.ravel(), image.T.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(("shape", "labels"), [((1, 1), 0), ((1, 9), 1), ((30, 20), 0), ((30, 20), 2)])
def test_overlay_draws_any_slice(shape, labels):
    constant = np.full(shape, 3.0, np.float32)
    label = np.full(shape, labels, np.uint8)
    cuts = figures.planes(constant, label, label, constant / 3, np.eye(4))
    assert figures.png(figures.overlay({"A": cuts}, CLASSES)).startswith(b"\x89PNG")


def test_the_same_picture_is_the_same_bytes():
    image = np.eye(8, dtype=np.float32)
    cuts = figures.planes(image, image.astype(np.uint8), image.astype(np.uint8), image, np.eye(4))
    first, second = (figures.png(figures.overlay({"A": cuts, "B": cuts}, CLASSES)) for _ in range(2))
    assert first == second


def test_plots_of_nothing():
    empty = np.array([], np.float32)
    nothing = figures.BoundaryPoints(empty, empty, float("nan")).thinned()
    same = np.ones(5, np.float32)
    flat = figures.BoundaryPoints(same * 0, same, float("nan"))
    assert figures.png(figures.gradient_plots({"A": nothing, "B": flat}))
    assert figures.png(figures.gradient_plots({"": nothing}))
    curve = Reliability(*(torch.full((10,), v) for v in (torch.nan, torch.nan, 0.0)))
    assert figures.png(figures.reliability({"": (curve, float("nan"))}))
    assert figures.png(figures.risk_coverage({"A": ([], [], float("nan"))}))
    profile = figures.Profile(["0", ">0"], [0.0, 0.9], np.full((2, 2), np.nan))
    assert figures.png(figures.distance_plot({"A": profile}))
    assert figures.png(figures.noise_plot({"A": profile}))


def test_no_figure_is_left_to_pyplot():
    assert not _pylab_helpers.Gcf.get_all_fig_managers()


def test_glossary_names_classes():
    metric = glossary.describe("dice/left ventricle")
    assert metric.label == "Dice, left ventricle"
    assert metric.better == "higher"
