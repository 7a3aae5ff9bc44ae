"""Abstention: the bound in simulation, thresholds against brute force, files, and what `predict` makes of them."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny_run import CLASSES, make_run, write_data

import sure.calibrate
import sure.predict
from sure.calibrate import (
    STEPS,
    THRESHOLDS,
    Abstention,
    calibrate,
    count_answers,
    largest_threshold,
    load_calibration,
    losses_of,
)
from sure.data import IGNORE, Case, load_case
from sure.errors import UserError
from sure.inference import Inference, infer
from sure.predict import predict

CASES = 5
ALPHA = 0.6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), CASES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose uncertainty varies and whose classes are all predicted somewhere."""
    made = make_run(tmp_path_factory.mktemp("run"), seed=4)
    return dataclasses.replace(made, held_out=tuple(f"case_{i}" for i in range(CASES)))


@pytest.fixture(autouse=True)
def loaded(monkeypatch, run):
    for module in (sure.calibrate, sure.predict):
        monkeypatch.setattr(module, "load_run", lambda path, **_: run)


@pytest.fixture(scope="module")
def calibrated(data, run, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sure.calibrate, "load_run", lambda path, **_: run)
        return path, calibrate(run.path, data, path, alpha=ALPHA, progress=False)


def test_the_bound_holds_in_simulation():
    """Over calibrations and new cases the mean error stays within alpha, though each curve rises and falls."""
    rng = np.random.default_rng(0)
    steps, n, alpha, trials = 40, 19, 0.2, 2000

    def draw(count: int) -> np.ndarray:
        hard = rng.beta(1, 3, (count, 1))
        curve = hard * np.linspace(0, 1, steps) ** 2 + 0.05 * rng.normal(size=(count, steps))
        return curve.clip(0, 1)

    errors = []
    for _ in range(trials):
        index = largest_threshold(losses_of(draw(n), [str(i) for i in range(n)]), alpha)
        errors.append(0.0 if index is None else float(draw(1)[0, index]))
    sem = np.std(errors) / np.sqrt(trials)
    assert np.mean(errors) < alpha + 2 * sem
    assert np.mean(errors) > alpha / 4  # and is not won by abstaining


def test_largest_threshold_by_hand():
    errors = np.array([[0.0, 0.1, 0.3, 0.0], [0.0, 0.2, 0.1, 0.4], [0.0, 0.0, 0.0, 0.0]])
    # envelopes end at 0.3, 0.4 and 0: (sum + 1) / 4 is 0.25, 0.325, 0.375, 0.425
    losses = losses_of(errors, ["a", "b", "c"])
    found = [largest_threshold(losses, alpha) for alpha in (0.2, 0.25, 0.33, 0.4, 0.5)]
    assert found == [None, 0, 1, 2, 3]


def test_cases_of_a_patient_count_once():
    """Two frames of a patient: one loss, the mean of their envelopes."""
    errors = np.array([[0.0, 0.4, 0.2], [0.1, 0.1, 0.1], [0.2, 0.0, 0.8]])
    losses = losses_of(errors, ["p2", "p1", "p2"])
    np.testing.assert_allclose(losses, [[0.1, 0.1, 0.1], [0.1, 0.3, 0.6]])
    assert [largest_threshold(losses, alpha) for alpha in (0.39, 0.4, 0.47, 0.57)] == [None, 0, 1, 2]


def test_counts_against_brute_force():
    rng = np.random.default_rng(1)
    shape = (7, 6, 5)
    predicted = torch.from_numpy(rng.integers(0, 3, shape).astype(np.uint8))
    label = torch.from_numpy(rng.integers(0, 3, shape).astype(np.int16))
    label[0] = IGNORE
    # on the thresholds themselves too: a voxel is answered at the threshold that it equals
    u = torch.from_numpy(rng.choice([0.0, 0.1, 0.25, 0.2505, 0.999, 1.0], shape)).double()
    result = Inference(torch.zeros(3, *shape), u[None], predicted)
    answered, wrong = count_answers(result, label, 3)
    assert answered.shape == wrong.shape == (4, STEPS)
    for t in (0, 98, 99, 100, 249, 250, 998, 999):
        for k in range(4):
            voxels = (label != IGNORE) & (u <= THRESHOLDS[t])
            if k:
                voxels &= predicted == k - 1
            assert answered[k, t] == int(voxels.sum())
            assert wrong[k, t] == int((voxels & (predicted != label)).sum())


def test_thresholds_are_the_largest_that_the_bound_allows(data, run, calibrated):
    report = calibrated[1]
    curves = {name: [] for name in ("overall", *CLASSES)}
    for i in range(CASES):
        case = load_case(Case("", (data / f"images/case_{i}.nii.gz",), data / f"labels/case_{i}.nii.gz"))
        result = infer(run, case.image[None])
        u, label, truth = (t.numpy() for t in (result.uncertainty[0].double(), result.label, case.label[0]))
        for name in curves:
            inside = np.ones_like(u, bool) if name == "overall" else label == CLASSES.index(name)
            if inside.any():
                errors = []
                for t in THRESHOLDS:
                    answered = inside & (u <= t)
                    errors.append(float((label != truth)[answered].mean()) if answered.any() else 0.0)
                curves[name].append(errors)
    fitted = {"overall": report["overall"], **report["classes"]}
    assert any(values["threshold"] not in (None, 1.0) for values in fitted.values())
    for name, values in fitted.items():
        errors = np.array(curves[name])
        assert values["cases"] == values["patients"] == len(errors)
        envelope = np.maximum.accumulate(errors, 1)
        bounds = (envelope.sum(0) + 1) / (len(errors) + 1)
        allowed = np.flatnonzero(bounds <= ALPHA)
        if not len(allowed):
            assert values["threshold"] is None
            assert values["coverage"] == values["error"] == 0
            continue
        assert values["threshold"] == THRESHOLDS[allowed[-1]]
        assert values["bound"] == pytest.approx(bounds[allowed[-1]])
        assert values["error"] == pytest.approx(errors[:, allowed[-1]].mean())
        assert values["error_of_all"] == pytest.approx(errors[:, -1].mean())
        assert values["error"] <= values["bound"] <= ALPHA


def test_file(run, calibrated, data):
    path, report = calibrated
    assert json.loads(path.read_text()) == report
    assert report["kind"] == "sure calibration"
    assert report["cases"] == [f"case_{i}" for i in range(CASES)]
    assert len(report["run"]["weights"]) == 64
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    calibrate(run.path, data, alpha=ALPHA, progress=False)
    calibrate(run.path, data, alpha=ALPHA, progress=False)  # an earlier one is replaced
    assert (run.path / "calibration.json").is_file()


@pytest.mark.parametrize("abstain", ["overall", "class"])
def test_predict_applies_it(data, run, calibrated, tmp_path, abstain):
    path, report = calibrated
    image = data / "images/case_1.nii.gz"
    options = {"calibration": path, "abstain": abstain, "progress": False}
    written = predict(run.path, [image], tmp_path / "out", **options)
    assert [p.name for p in written] == ["case_1_seg.nii.gz", "case_1_unc.nii.gz", "case_1_abstain.nii.gz"]
    labels, u, mask = (np.asarray(nib.load(p).dataobj) for p in written)
    rows = [report["overall"]] * 3 if abstain == "overall" else [report["classes"][name] for name in CLASSES]
    limits = np.array([-1.0 if row["threshold"] is None else row["threshold"] for row in rows])
    np.testing.assert_array_equal(mask, u.astype(np.float64) > limits[labels])
    result = nib.load(written[2])
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(result.affine, nib.load(image).affine)
    plain = predict(run.path, [image], tmp_path / "plain", progress=False)
    for with_, without in zip(written[:2], plain, strict=True):
        assert with_.read_bytes() == without.read_bytes()


def test_abstention_without_a_threshold():
    result = Inference(torch.zeros(2, 1, 1, 3), torch.tensor([[[[0.0, 0.3, 0.3]]]]), torch.tensor([[[0, 1, 1]]]))
    assert Abstention((0.0, 0.5)).mask(result).tolist() == [[[True, False, False]]]
    assert Abstention((0.5, 0.25)).mask(result).tolist() == [[[False, True, True]]]


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_quantised_uncertainty(data, run, tmp_path, kind):
    image = data / "images/case_0.nii.gz"
    exact = predict(run.path, [image], tmp_path / "exact", progress=False)
    coarse = predict(run.path, [image], tmp_path / "coarse", quantise_uncertainty=kind, progress=False)
    before, after = nib.load(exact[1]), nib.load(coarse[1])
    assert after.get_data_dtype() == kind
    step, offset = after.dataobj.slope, after.dataobj.inter
    assert offset == 0
    assert step == pytest.approx(1 / np.iinfo(kind).max, rel=1e-6)
    stored = np.asarray(after.dataobj.get_unscaled()).ravel()
    assert len(np.unique(stored)) > 20
    assert Fraction(int(np.iinfo(kind).max)) * Fraction(step) <= 1
    truth = before.get_fdata().ravel()
    worst = max(abs(Fraction(int(s)) * Fraction(step) - Fraction(t)) for s, t in zip(stored, truth, strict=True))
    assert worst <= Fraction(step) / 2
    np.testing.assert_array_equal(after.affine, before.affine)
    for form in ("get_sform", "get_qform"):
        for mine, theirs in zip(getattr(after, form)(coded=True), getattr(before, form)(coded=True), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert exact[0].read_bytes() == coarse[0].read_bytes()
    assert coarse[1].stat().st_size < exact[1].stat().st_size


def test_bad_arguments(data, run, calibrated, tmp_path):
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="alpha: expected a number between 0 and 1"):
            calibrate(run.path, data, tmp_path / "c.json", alpha=alpha, progress=False)
    with pytest.raises(
        UserError, match=r"alpha: 0.1 takes cases of at least 9 patients, .* has 5 .*they allow 0\.1667 and more"
    ):
        calibrate(run.path, data, tmp_path / "c.json", progress=False)
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is something else than an earlier calibration"):
        calibrate(run.path, data, notes, alpha=ALPHA, progress=False)
    assert notes.read_text() == '{"mine": 1}'
    with pytest.raises(UserError, match="expected a file name, found a folder"):
        calibrate(run.path, data, tmp_path, alpha=ALPHA, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]

    image = data / "images/case_0.nii.gz"
    for path, message in ((notes, "not written by sure calibrate"), (tmp_path / "none.json", "no such file")):
        with pytest.raises(UserError, match=message):
            predict(run.path, [image], tmp_path / "out", calibration=path, progress=False)
    with pytest.raises(UserError, match="abstain: expected overall or class, got 'voxel'"):
        load_calibration(calibrated[0], run, "voxel")
    with pytest.raises(UserError, match="abstain: expected a calibration with 'class'"):
        predict(run.path, [image], tmp_path / "out", abstain="class", progress=False)
    with pytest.raises(UserError, match="quantise_uncertainty: expected one of off, uint8, uint16, got 'int8'"):
        predict(run.path, [image], tmp_path / "out", quantise_uncertainty="int8", progress=False)
    other = make_run(tmp_path, seed=5)
    with pytest.raises(UserError, match="is of other weights than the final checkpoint of"):
        load_calibration(calibrated[0], other)
    torn = json.loads(calibrated[0].read_text())
    del torn["classes"]["core"]
    (tmp_path / "torn.json").write_text(json.dumps(torn))
    with pytest.raises(UserError, match="not a calibration of this run: KeyError: 'core'"):
        load_calibration(tmp_path / "torn.json", run, "class")
    assert not (tmp_path / "out").exists()
