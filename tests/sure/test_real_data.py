"""On real MRI (where it is present): a small network learns, and its predictions keep the geometry."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sure.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["edl", "sure"])
def test_hippocampus(hippocampus: Path, tmp_path, loss):
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ["--epochs", "40", "--patch-size", "40", "56", "40", "--lr", "4e-3", "--no-progress"]
    assert main(["train", str(hippocampus), "--out", str(run), "--loss", loss, *settings]) == 0
    assert main(["evaluate", str(run), str(hippocampus), "--out", str(out / "eval"), "--no-progress"]) == 0
    summary = json.loads((out / "eval" / "metrics.json").read_text())["summary"]
    assert summary["dice"]["mean"] >= 0.82
    assert summary["dice"]["n"] == 20
    sweep = ["--corruptions", "gaussian_mean", "blur", "--no-progress"]
    assert main(["robustness", str(run), str(hippocampus), "--out", str(out / "rob"), *sweep]) == 0
    robust = json.loads((out / "rob" / "robustness.json").read_text())
    assert robust["clean"]["summary"] == summary
    for corruption in robust["corruptions"]:
        strongest = corruption["levels"][-1]
        assert strongest["summary"]["dice"]["mean"] < summary["dice"]["mean"] - 0.05
        assert strongest["detection_volumes"][0] == 20
    assert main(["calibrate", str(run), str(hippocampus), "--alpha", "0.1", "--no-progress"]) == 0
    fitted = json.loads((run / "calibration.json").read_text())
    for values in (fitted["overall"], *fitted["classes"].values()):
        assert values["error"] <= values["bound"] <= 0.1
        assert values["coverage"] > 0.2
    image = sorted((hippocampus / "imagesTr").glob("*.nii.gz"))[0]
    assert main(["predict", str(run), str(image), "--out", str(out), "--no-progress"]) == 0
    source = nib.load(image)
    for ending in ("seg", "unc"):
        got = nib.load(out / f"{image.name.removesuffix('.nii.gz')}_{ending}.nii.gz")
        assert got.shape == source.shape
        np.testing.assert_array_equal(got.affine, source.affine)
        np.testing.assert_array_equal(got.header.get_zooms(), source.header.get_zooms())
