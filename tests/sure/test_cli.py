"""The command line: exit statuses, messages, and the whole way from phantoms to a report."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sure.cli import COMMANDS, main
from sure.config import TrainConfig
from sure.data import write_phantoms
from sure.demo import MARKER, SETTINGS, demo
from sure.errors import UserError

TINY = ["--patch-size", "16", "--channels", "4", "8", "--folds", "2", "--epochs", "2", "--no-progress"]


def test_help_is_quick_and_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert name in out
    code = "import sys, sure.cli; sys.exit(int('torch' in sys.modules or 'monai' in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tarin"], "expected one of demo, phantom, train"),
        (["train", "nowhere", "--out", "x"], "nowhere"),
        (["train", ".", "--out", "x", "--config", "none.yaml"], "none.yaml: cannot be read as YAML"),
        (["train", ".", "--out", "x", "--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["train", ".", "--out", "x", "--device", "gpu7"], "device: 'gpu7' cannot be used"),
        (["evaluate", "nowhere", ".", "--out", "x"], "nowhere: not a run folder"),
        (["predict", "nowhere", "a.nii.gz", "--out", "x"], "nowhere: not a run folder"),
        (["report", "nowhere"], "nowhere"),
        (["phantom", "x", "--shape", "4", "4", "4"], "shape"),
        (["phantom", "/dev/null/x", "--cases", "1", "--shape", "16", "16", "16"], "/dev/null"),
        (["train", ".", "--out", "x", "--device", "meta"], "device: 'meta' cannot be used"),
        (["train", ".", "--out", "x", "--workers", "-1"], "workers: expected 0 or more"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("sure: ")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_settings_without_effect_are_told(tmp_path, capsys):
    data = write_phantoms(tmp_path / "data", cases=4, shape=(20, 20, 16))
    args = ["train", str(data), "--loss", "edl", *TINY, "--epochs", "1"]
    assert main([*args, "--out", str(tmp_path / "a"), "--ranking", "exact", "--gradient-weight", "5"]) == 0
    told = "sure: gradient_weight, ranking: without effect for loss edl"
    assert told in capsys.readouterr().err.splitlines()
    noised = ["--loss", "sure", "--noise", "images", "--far-weight", "5", "--noise-std", "0.2"]
    assert main([*args, *noised, "--out", str(tmp_path / "c")]) == 0
    told = "sure: far_weight: without effect for noise images, whose loss has a far term of its own"
    assert told in capsys.readouterr().err.splitlines()
    assert main([*args, *noised, "--noise-weight", "0", "--out", str(tmp_path / "e")]) == 0
    assert "far_weight" not in capsys.readouterr().err
    assert main([*args, "--loss", "sure", "--noise-std", "0.2", "--out", str(tmp_path / "d")]) == 0
    assert "sure: noise_std: without effect for noise off" in capsys.readouterr().err.splitlines()
    preset = ["--preset", "sure-acdc", "--spatial-dims", "3"]
    assert main([*args, *preset, "--out", str(tmp_path / "b")]) == 0
    assert "without effect" not in capsys.readouterr().err


def test_a_file_is_no_run_folder(tmp_path, capsys):
    (tmp_path / "final.pt").write_bytes(b"")
    assert main(["evaluate", str(tmp_path / "final.pt"), ".", "--out", str(tmp_path / "out")]) == 2
    assert "final.pt: expected a run folder, found a file" in capsys.readouterr().err


def test_unknown_flags_end_with_status_2(capsys):
    assert main(["train", ".", "--out", "x", "--epoch", "3"]) == 2
    assert capsys.readouterr().err == (
        "sure: Unrecognized options: --epoch, 3; `sure train --help` lists the arguments\n"
    )


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert main(["train", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 2
    assert "data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_whole_way(tmp_path, capsys):
    data, run, out = (str(tmp_path / name) for name in ("data", "run", "out"))
    assert main(["phantom", data, "--cases", "4", "--shape", "24", "20", "16"]) == 0
    assert main(["train", data, "--out", run, "--loss", "sure", *TINY]) == 0
    assert main(["evaluate", run, data, "--out", f"{out}/eval", "--pictures", "1", "--no-progress"]) == 0
    assert main(["report", f"{out}/eval", "--out", f"{out}/report.html"]) == 0
    images = sorted((tmp_path / "data" / "imagesTr").glob("*.nii.gz"))
    assert main(["predict", run, str(images[0]), "--out", f"{out}/pred", "--no-progress"]) == 0
    sweep = ["--corruptions", "blur", "--levels", "1", "2", "--seed", "1", "--no-progress"]
    capsys.readouterr()
    assert main(["robustness", run, data, "--out", f"{out}/rob", *sweep]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[2:4]] == [["blur", "1"], ["blur", "2"]]
    assert main(["calibrate", run, data, "--alpha", "0.6", "--no-progress"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}/calibration.json"
    assert main(["calibrate", run, data, "--alpha", "0.01", "--no-progress"]) == 2
    assert "alpha: 0.01 takes cases of at least 99 patients" in capsys.readouterr().err
    stored = ["--calibration", f"{run}/calibration.json", "--abstain", "class", "--quantise-uncertainty", "uint8"]
    assert main(["predict", run, str(images[0]), "--out", f"{out}/small", *stored, "--no-progress"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    name = images[0].name.removesuffix(".nii.gz")
    image = nib.load(images[0])
    for ending in ("seg", "unc"):
        got = nib.load(tmp_path / "out" / "pred" / f"{name}_{ending}.nii.gz")
        assert got.shape == image.shape
        np.testing.assert_array_equal(got.affine, image.affine)
        np.testing.assert_allclose(got.header.get_zooms(), image.header.get_zooms())
    uncertainty = got.get_fdata()
    assert uncertainty.min() > 0
    assert uncertainty.max() <= 1
    report = json.loads((tmp_path / "out" / "eval" / "metrics.json").read_text())
    trained = json.loads((tmp_path / "run" / "run.json").read_text())["train"]
    assert not {case["name"] for case in report["cases"]} & set(trained)


def test_settings_from_yaml_and_flags(tmp_path):
    data = write_phantoms(tmp_path / "data", cases=4, shape=(20, 20, 16))
    (tmp_path / "c.yaml").write_text("loss: edl\nepochs: 5\nchannels: [4, 8]\npatch_size: 16\nfolds: 2\n")
    run = tmp_path / "run"
    args = ["train", str(data), "--out", str(run), "--config", str(tmp_path / "c.yaml")]
    assert main([*args, "--epochs", "1", "--no-progress"]) == 0
    from sure.config import load_config

    expected = TrainConfig(loss="edl", epochs=1, channels=(4, 8), patch_size=(16,), folds=2)
    assert load_config(run / "config.yaml") == expected


def test_pictures_by_number_or_name(monkeypatch, tmp_path):
    seen = []

    def evaluate(*_, pictures, **__):
        seen.append(pictures)
        return {"summary": {}}

    monkeypatch.setattr("sure.evaluate.evaluate", evaluate)
    for given in ([], ["2"], ["case_a"], ["case_a", "7"], ["006"]):
        flags = ["--pictures", *given] if given else []
        assert main(["evaluate", "run", "data", "--out", str(tmp_path / "eval"), *flags]) == 0
    assert seen == [3, 2, ("case_a",), ("case_a", "7"), ("006",)]


def test_config_goes_before_preset(tmp_path):
    from sure.cli import _settings
    from sure.config import load_preset

    (tmp_path / "c.yaml").write_text("epochs: 60\n")
    for args in (["--preset", "sure-acdc", f"--config={tmp_path / 'c.yaml'}"], ["--preset=sure-acdc"]):
        config = _settings(args)
        epochs = 60 if len(args) == 3 else 100
        assert config == replace(load_preset("sure-acdc"), epochs=epochs)
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run"), "--preset", "acdc"]) == 2


def test_demo(tmp_path):
    settings = replace(SETTINGS, epochs=2, channels=(4, 8), patch_size=(16,), folds=2)
    out = tmp_path / "demo"
    report = demo(out, progress=False, settings=settings, cases=4)
    assert report == out / "report.html"
    page = report.read_text()
    assert "EDL" in page
    assert "SURE" in page
    assert 'src="http' not in page
    assert "Gaussian noise of growing mean" in page
    assert page.count('<article class="case">') == 2  # of two held-out cases, the same for both
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("EDL", "SURE"):
        trained = json.loads((out / "runs" / name / "run.json").read_text())["train"]
        assert metrics[name]["cases"]
        assert not set(metrics[name]["cases"]) & set(trained)
        assert metrics[name]["summary"]["dice"]["n"] == len(metrics[name]["cases"])
    notes = out / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="taken by something other than a demo"):
        demo(out, progress=False, settings=settings, cases=4)
    assert notes.read_text() == "mine"
    notes.unlink()
    (out / MARKER).unlink()
    with pytest.raises(UserError, match="taken by something other than a demo"):
        demo(out, progress=False, settings=settings, cases=4)
    assert report.exists()


def test_real_data_is_sound(hippocampus: Path):
    from sure.data import check_dataset, discover

    dataset = discover(hippocampus)
    assert len(dataset.cases) == 100
    assert check_dataset(dataset) == (3, [])


def test_training_cases_are_never_scored_as_held_out(tmp_path, capsys):
    import shutil

    data = write_phantoms(tmp_path / "data", cases=4, shape=(20, 20, 16))
    run = tmp_path / "run"
    assert main(["train", str(data), "--out", str(run), "--loss", "edl", *TINY]) == 0
    trained = json.loads((run / "run.json").read_text())["train"]
    subset = tmp_path / "subset"
    for part in ("images", "labels"):
        (subset / part).mkdir(parents=True)
        for name in trained:
            shutil.copy(data / f"{part}Tr" / f"{name}.nii.gz", subset / part)
    args = ["evaluate", str(run), str(subset), "--out", str(tmp_path / "eval"), "--pictures", "0", "--no-progress"]
    assert main(args) == 2
    assert "the run was trained on every case of that name here" in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()
    assert main([*args, "--cases", "all"]) == 0


def test_the_readme_examples():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    first, second = (block.split("```")[0] for block in readme.split("```python\n")[1:])
    scope: dict[str, object] = {}
    exec(first, scope)
    assert float(scope["loss"].detach()) > 0
    assert scope["logits"].grad is not None
    assert scope["maps"]._fields == ("probability", "vacuity", "mutual_information")

    torch.manual_seed(0)
    network = scope["network"] = torch.nn.Conv3d(1, 4, 3, padding=1)
    scope["logits"] = network(scope["image"])
    exec(second, scope)
    assert network.weight.grad.any()
