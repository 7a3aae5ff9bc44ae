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
    image = sorted((hippocampus / "imagesTr").glob("*.nii.gz"))[0]
    assert main(["predict", str(run), str(image), "--out", str(out), "--no-progress"]) == 0
    source = nib.load(image)
    for ending in ("seg", "unc"):
        got = nib.load(out / f"{image.name.removesuffix('.nii.gz')}_{ending}.nii.gz")
        assert got.shape == source.shape
        np.testing.assert_array_equal(got.affine, source.affine)
        np.testing.assert_array_equal(got.header.get_zooms(), source.header.get_zooms())
