"""What a careless or malicious user gives the command line: one message, status 2, nothing written; or it works.

docs/reliability.md lists these cases; a test holds the two to each other.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sure.checkpoint import load_run, weights_digest
from sure.cli import main
from sure.files import atomic_folder, write_text

TINY = ["--patch-size", "16", "--channels", "4", "8", "--folds", "2", "--epochs", "1", "--no-progress"]
SHAPE = (20, 20, 16)
DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A data set, a run and an evaluation, made once and copied for every case."""
    root = tmp_path_factory.mktemp("made")
    data, run, ev = (str(root / name) for name in ("data", "run", "ev"))
    assert main(["phantom", data, "--cases", "4", "--shape", *map(str, SHAPE)]) == 0
    assert main(["train", data, "--out", run, *TINY]) == 0
    assert main(["evaluate", run, data, "--out", ev, "--pictures", "2", "--no-progress"]) == 0
    assert main(["calibrate", run, data, "--alpha", "0.6", "--no-progress"]) == 0
    return root


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as a terminal sends it, also where the tests run in the background, whose shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def kit(made, tmp_path, monkeypatch) -> Path:
    root = tmp_path / "kit"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root


def image() -> Path:
    return Path("data/imagesTr/phantom_001.nii.gz")


def label() -> Path:
    return Path("data/labelsTr/phantom_001.nii.gz")


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def packed(change):
    """Change of the uncompressed bytes."""

    def apply(raw: bytes) -> bytes:
        plain = bytearray(gzip.decompress(raw))
        change(plain)
        return gzip.compress(bytes(plain))

    return apply


def put(start: int, value: bytes):
    return packed(lambda plain: plain.__setitem__(slice(start, start + len(value)), value))


def store(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    nib.save(nib.Nifti1Image(array, nib.load(path).affine if affine is None else affine), path)


def stored(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def spoilt(path: Path, value: float, dtype: type = np.float32) -> None:
    array = stored(path).astype(dtype)
    array[1, 2, 3] = value
    store(path, array)


def edit_json(path: str, change) -> None:
    values = json.loads(Path(path).read_text())
    result = change(values)
    Path(path).write_text(json.dumps(values if result is None else result))


def weights(change) -> None:
    path = Path("run/checkpoints/final.pt")
    torch.save(change(torch.load(path)), path)


class Bomb:
    """Runs a command where a pickle is trusted."""

    def __reduce__(self):
        return os.system, ("touch BOOM",)


def pickled() -> None:
    Path("run/checkpoints/final.pt").write_bytes(pickle.dumps({"model": Bomb()}))


def config(text: str):
    return lambda: Path("c.yaml").write_text(text)


def linked(name: str):
    return lambda: os.symlink(name, name)


TRAIN = ["train", "data", "--out", "new", *TINY]
CONFIG = [*TRAIN, "--config", "c.yaml"]
PREDICT = ["predict", "run", "data/imagesTr", "--out", "new", "--no-progress"]
REPORT = ["report", "ev", "--out", "new.html"]
EVALUATE = ["evaluate", "run", "data", "--out", "new", "--no-progress"]
ROBUSTNESS = ["robustness", "run", "data", "--out", "new", "--no-progress", "--corruptions", "blur", "--levels", "1"]
CALIBRATE = ["calibrate", "run", "data", "--out", "new", "--alpha", "0.6", "--no-progress"]
COMPARE = ["compare", "data", "--out", "new", *TINY]
PHANTOM = ["phantom", "new", "--cases", "1", "--shape", "16", "16", "16"]
DEMO = ["demo", "--out", "new", "--no-progress"]
ABSTAIN = [*PREDICT, "--calibration", "run/calibration.json"]


def to(place: str, args: list[str]) -> list[str]:
    """`args` with another place for the results."""
    return [place if arg in ("new", "new.html") else arg for arg in args]


def threshold(value: object):
    change = lambda v: {**v, "overall": {**v["overall"], "threshold": value}}
    return lambda: edit_json("run/calibration.json", change)


def damaged_comparison(torn: str) -> None:
    """A comparison of which the evaluations or the sweeps are torn."""
    evaluation = {"weights": weights_digest(load_run(Path("run")).model), "pictures": {"planes": {}}}
    for arm in ("edl", "sure"):
        for part, file in (("evaluations", "metrics.json"), ("robustness", "robustness.json")):
            folder = Path("new") / part / arm / "fold-0"
            folder.mkdir(parents=True)
            (folder / file).write_text("{" if file == torn else json.dumps(evaluation))
        run = Path("new/runs") / arm / "fold-0"
        shutil.copytree("run", run)
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("loss: sure", f"loss: {arm}"))


# id: what is done to the files, the command, and what its message says
BAD = {
    # images and labels
    "gzip cut short": (lambda: rewrite(image(), lambda raw: raw[:-900]), TRAIN, "truncated or damaged gzip"),
    "image of no bytes": (lambda: image().write_bytes(b""), TRAIN, "empty file"),
    "HTML for an image": (lambda: image().write_bytes(b"<html>"), TRAIN, "bad gzip file"),
    "rubbish behind an image": (lambda: rewrite(image(), lambda raw: raw + b"rubbish"), TRAIN, "gzip"),
    "bad magic": (lambda: rewrite(image(), put(344, b"oops")), TRAIN, "not a NIfTI file"),
    "header of 10^13 voxels": (
        lambda: rewrite(image(), put(40, np.array([3, 32767, 32767, 32767], "<i2").tobytes())),
        TRAIN,
        "header claims shape (32767, 32767, 32767)",
    ),
    "unknown data type": (lambda: rewrite(image(), put(70, b"\x99\x99")), TRAIN, "cannot be read as NIfTI"),
    "no voxels": (lambda: rewrite(image(), put(42, b"\0\0")), TRAIN, "has no voxels"),
    "4D image": (lambda: store(image(), np.stack([stored(image())] * 3, -1)), TRAIN, "expected a 3D image, found"),
    "complex image": (lambda: store(image(), stored(image()).astype(np.complex64)), TRAIN, "found complex voxels"),
    "NaN in an image": (lambda: spoilt(image(), np.nan), TRAIN, "1 voxels are NaN"),
    "infinity in an image": (lambda: spoilt(image(), np.inf), PREDICT, "1 voxels are NaN, infinite"),
    "singular affine": (
        lambda: rewrite(image(), put(280, np.zeros(12, "<f4").tobytes())),
        TRAIN,
        "affine is singular",
    ),
    "NaN affine": (
        lambda: rewrite(image(), put(280, np.full(12, np.nan, "<f4").tobytes())),
        TRAIN,
        "affine holds NaN or infinity",
    ),
    "swapped axes of a label": (lambda: store(label(), stored(label()).swapaxes(1, 2)), TRAIN, "grid differs"),
    "label of a shifted grid": (
        lambda: store(label(), stored(label()), nib.load(label()).affine + np.eye(4, k=3) * 5),
        TRAIN,
        "affine differs from the image's by",
    ),
    "fractions in a label": (lambda: spoilt(label(), 0.5), TRAIN, "expected whole numbers, found 0.5"),
    "negative label": (lambda: spoilt(label(), -1), TRAIN, "labels out of range: expected 0 to 3, found -1"),
    "label beyond the classes": (lambda: spoilt(label(), 9), TRAIN, "labels out of range: expected 0 to 3, found 9"),
    "image missing": (lambda: image().unlink(), TRAIN, "named in dataset.json, but not there"),
    "folder for an image": (lambda: (image().unlink(), image().mkdir()), TRAIN, "but not there"),
    "image that links to itself": (lambda: (image().unlink(), os.symlink(image().name, image())), TRAIN, "not there"),
    # the data set
    "empty folder": (lambda: Path("none").mkdir(), ["train", "none", "--out", "new", *TINY], "none: empty folder"),
    "file for a data set": (config("x"), ["train", "c.yaml", "--out", "new", *TINY], "expected a folder, found a file"),
    "folder that links to itself": (linked("loop"), ["train", "loop", "--out", "new", *TINY], "loop: no such folder"),
    "dataset.json cut short": (
        lambda: rewrite(Path("data/dataset.json"), lambda raw: raw[:100]),
        TRAIN,
        "dataset.json: cannot be read as JSON",
    ),
    "dataset.json without cases": (
        lambda: edit_json("data/dataset.json", lambda v: {"labels": v["labels"]}),
        TRAIN,
        'expected "training" (Decathlon) or "channel_names" (nnU-Net)',
    ),
    "dataset.json of 10^5 brackets": (
        lambda: Path("data/dataset.json").write_text("[" * 100_000),
        TRAIN,
        "dataset.json: cannot be read as JSON: nested too deeply",
    ),
    # settings
    "unknown setting": (config("epoch: 3"), CONFIG, "c.yaml: unknown keys epoch"),
    "setting given twice": (
        config("epochs: 3\nlr: 1.0e-3\nepochs: 4"),
        CONFIG,
        "cannot be read as YAML: epochs is set twice",
    ),
    "setting of another type": (config("epochs: many"), CONFIG, "epochs: expected int, got 'many'"),
    "setting without values": (config("patch_size: []"), CONFIG, "patch_size: expected one number or more, got none"),
    "key that is no word": (config("1: 2"), CONFIG, "c.yaml: unknown keys 1;"),
    "number of 400 digits": (config("lr: " + "9" * 400), CONFIG, "lr: expected a 64-bit number"),
    "settings of 10^4 brackets": (config("[" * 10_000), CONFIG, "cannot be read as YAML: nested too deeply"),
    "YAML that runs a program": (
        config('!!python/object/apply:os.system ["touch BOOM"]'),
        CONFIG,
        "could not determine a constructor",
    ),
    "settings in a folder": (lambda: Path("c.yaml").mkdir(), CONFIG, "c.yaml: cannot be read as YAML"),
    "no such device": (lambda: None, [*TRAIN, "--device", "gpu7"], "device: 'gpu7' cannot be used"),
    "blank path": (lambda: None, ["predict", "run", "data/imagesTr", "--out", ""], "expected a value after '--out'"),
    # flags
    "unknown command": (lambda: None, ["tarin"], "expected one of demo, phantom, train"),
    "unknown flag": (lambda: None, [*TRAIN, "--epoch", "3"], "Unrecognized options: --epoch, 3"),
    "word for a number": (lambda: None, [*TRAIN, "--epochs", "many"], "Error parsing --epochs: invalid literal"),
    "unknown choice": (lambda: None, [*TRAIN, "--loss", "ce"], "invalid choice 'ce' for argument '--loss'"),
    "no place for results": (lambda: None, ["train", "data"], "Missing from sure train: --out PATH"),
    "flag without values": (
        lambda: None,
        [*TRAIN, "--patch-size"],
        "patch_size: expected one number or more, got none",
    ),
    "learning rate NaN": (lambda: None, [*TRAIN, "--lr", "nan"], "lr: expected finite numbers of at least 0, got nan"),
    "patches beyond memory": (
        lambda: None,
        [*TRAIN, "--patch-size", "1600000000"],
        "patch_size: expected at most 2^30 voxels",
    ),
    "network beyond memory, new": (
        lambda: None,
        [*TRAIN, "--channels", "4", "9999999999"],
        "model, channels: no such network can be built",
    ),
    "phantoms beyond memory": (
        lambda: None,
        ["phantom", "new", "--shape", "100000", "100000", "100000"],
        "out of memory: ",
    ),
    "more folds than cases": (
        lambda: None,
        [*TRAIN, "--folds", "9"],
        "folds: expected at most one for each case, got 9",
    ),
    "unknown preset": (lambda: None, [*TRAIN, "--preset", "x"], "preset: expected one of prius-acdc"),
    "blank after =": (lambda: None, ["report", "ev", "--out= "], "expected a value after '--out', got a blank one"),
    "unknown corruption": (lambda: None, [*ROBUSTNESS[:5], "--corruptions", "fog"], "corruptions: expected different"),
    "levels that fall": (lambda: None, [*ROBUSTNESS, "0.5"], "levels: expected growing numbers above 0 and below 1000"),
    "level NaN": (lambda: None, [*ROBUSTNESS, "nan"], "levels: expected growing numbers"),
    "level beyond reason": (lambda: None, [*ROBUSTNESS, "1e300"], "levels: expected growing numbers"),
    "alpha of 0": (lambda: None, [*CALIBRATE, "--alpha", "0"], "alpha: expected a number between 0 and 1, got 0.0"),
    "alpha NaN": (lambda: None, [*CALIBRATE, "--alpha", "nan"], "alpha: expected a number between 0 and 1, got nan"),
    "alpha of 1e-320": (lambda: None, [*CALIBRATE, "--alpha", "1e-320"], "takes cases of at least 999999999 patients"),
    "minus one picture": (lambda: None, [*EVALUATE, "--pictures", "-1"], "pictures: expected 0 or more, got -1"),
    "comparison of one": (lambda: None, [*COMPARE, "--arms", "edl"], "arms: expected at least two, got 1"),
    "comparison of twins": (
        lambda: None,
        [*COMPARE, "--arms", "edl", "edl"],
        "arms: expected different names, got edl",
    ),
    "unknown arm": (lambda: None, [*COMPARE, "--arms", "edl", "x"], "arms: expected edl, sure, dice_ce"),
    "arm of wrong settings": (
        config("epochs: -1"),
        [*COMPARE, "--arms", "edl", "c.yaml"],
        "c.yaml: epochs: expected at least 1, got -1",
    ),
    "unknown fold": (
        lambda: None,
        [*COMPARE, "--run-folds", "7"],
        "folds: expected different numbers from 0 to 1, got",
    ),
    "no phantoms": (lambda: None, [*PHANTOM, "--cases", "0"], "cases: expected at least 1, got 0"),
    "flat phantoms": (lambda: None, [*PHANTOM[:5], "1", "16", "16"], "shape: expected three sizes of at least 16"),
    "no images": (lambda: None, ["predict", "run", "--out", "new"], "images: expected at least one file or folder"),
    "no evaluations": (lambda: None, ["report", "--out", "new"], "evaluations: expected at least one folder"),
    "evaluation twice": (lambda: None, ["report", "ev", "ev", "--out", "new"], "expected distinct folder names"),
    "unknown checkpoint": (lambda: None, [*EVALUATE, "--checkpoint", "last"], "invalid choice 'last' for argument"),
    # runs and checkpoints
    "resumed with other settings": (
        lambda: None,
        [*to("run", TRAIN), "--resume", "--lr", "0.5"],
        "run: cannot resume another run: lr was 0.001, is 0.5",
    ),
    "resumed from a torn run.json": (
        lambda: Path("run/run.json").write_text("{"),
        [*to("run", TRAIN), "--resume"],
        "run.json: not the description of a run",
    ),
    "resumed from a torn checkpoint": (
        lambda: rewrite(Path("run/checkpoints/latest.pt"), lambda raw: raw[:999]),
        [*to("run", TRAIN), "--resume"],
        "latest.pt: not a checkpoint",
    ),
    "run of twin names": (
        lambda: edit_json("run/run.json", lambda v: {**v, "class_names": ["a"] * 4}),
        EVALUATE,
        "class_names: expected different names, found a, a, a, a",
    ),
    "calibration cut short": (
        lambda: rewrite(Path("run/calibration.json"), lambda raw: raw[:60]),
        ABSTAIN,
        "calibration.json: not written by sure calibrate",
    ),
    "evaluation for a calibration": (
        lambda: None,
        [*PREDICT, "--calibration", "ev/metrics.json"],
        "ev/metrics.json: not written by sure calibrate",
    ),
    "calibration of another run": (
        lambda: edit_json("run/calibration.json", lambda v: {**v, "run": {**v["run"], "weights": "x"}}),
        ABSTAIN,
        "calibration.json: is of other weights than the final checkpoint of run",
    ),
    "calibration without a threshold": (
        lambda: edit_json("run/calibration.json", lambda v: {k: x for k, x in v.items() if k != "overall"}),
        ABSTAIN,
        "calibration.json: not a calibration of this run",
    ),
    "threshold NaN": (threshold(np.nan), ABSTAIN, "expected thresholds from 0 to 1 or null, found nan"),
    "threshold -3": (threshold(-3), ABSTAIN, "expected thresholds from 0 to 1 or null, found -3"),
    "threshold of words": (threshold("high"), ABSTAIN, "expected thresholds from 0 to 1 or null, found 'high'"),
    "sweep cut short": (
        lambda: damaged_comparison("robustness.json"),
        [*COMPARE, "--run-folds", "0"],
        "robustness.json: damaged",
    ),
    "evaluation of a comparison cut short": (
        lambda: damaged_comparison("metrics.json"),
        [*COMPARE, "--run-folds", "0"],
        "metrics.json: damaged",
    ),
    "pickle that runs a program": (pickled, PREDICT, "final.pt: not a checkpoint that can be loaded safely"),
    "checkpoint that runs a program": (
        lambda: torch.save({"model": Bomb(), "epoch": 1}, "run/checkpoints/final.pt"),
        PREDICT,
        "final.pt: not a checkpoint that can be loaded safely",
    ),
    "checkpoint cut short": (
        lambda: rewrite(Path("run/checkpoints/final.pt"), lambda raw: raw[: len(raw) // 2]),
        PREDICT,
        "final.pt: not a checkpoint",
    ),
    "checkpoint of no bytes": (lambda: Path("run/checkpoints/final.pt").write_bytes(b""), PREDICT, "not a checkpoint"),
    "checkpoint of another network": (
        lambda: weights(lambda s: {**s, "model": {"x": torch.ones(1)}}),
        PREDICT,
        "weights do not fit the network",
    ),
    "complex weights": (
        lambda: weights(lambda s: {**s, "model": {k: v + 0j for k, v in s["model"].items()}}),
        PREDICT,
        "is complex, expected torch.float32",
    ),
    "NaN weights": (
        lambda: weights(lambda s: {**s, "model": {k: v * np.nan for k, v in s["model"].items()}}),
        PREDICT,
        "gives NaN or infinity",
    ),
    "run of minus four classes": (
        lambda: edit_json("run/run.json", lambda v: {**v, "num_classes": -4}),
        PREDICT,
        "num_classes: expected a whole number from 2 to 255, found -4",
    ),
    "run of 10^9 channels": (
        lambda: edit_json("run/run.json", lambda v: {**v, "in_channels": 10**9}),
        PREDICT,
        "in_channels: expected a whole number from 1 to 1024",
    ),
    "run without names": (
        lambda: edit_json("run/run.json", lambda v: {**v, "class_names": ["one"]}),
        PREDICT,
        "class_names: expected 4, one a class, found 1",
    ),
    "word for the cases of a run": (
        lambda: edit_json("run/run.json", lambda v: {**v, "train": "abc"}),
        PREDICT,
        "train: expected a list of names, found abc",
    ),
    "network beyond memory": (
        lambda: Path("run/config.yaml").write_text("patch_size: 16\nchannels: [10000000000, 2]\n"),
        PREDICT,
        "config.yaml: model, channels: no such network can be built",
    ),
    "run that is none": (lambda: None, ["predict", "data", "data/imagesTr", "--out", "new"], "data: not a run folder"),
    # results
    "results onto their inputs": (
        lambda: shutil.copy(image(), "data/imagesTr/phantom_001_seg.nii.gz"),
        ["predict", "run", "data/imagesTr", "--out", "data/imagesTr", "--no-progress"],
        "the result would replace an input",
    ),
    "result in a loop of links": (linked("new"), EVALUATE, "found a loop of symbolic links"),
    "results under a file": (config("x"), [*PREDICT[:3], "--out", "c.yaml", "--no-progress"], "found a file"),
    "results where nothing can be written": (
        lambda: None,
        [*PREDICT[:3], "--out", "/proc/new", "--no-progress"],
        "/proc/new: cannot be written: ",
    ),
    **{
        f"{args[0]} where nothing can be written": (
            lambda: None,
            to("/proc/new", args),
            "/proc/new: cannot be written: ",
        )
        for args in (TRAIN, EVALUATE, ROBUSTNESS, CALIBRATE, COMPARE, REPORT, PHANTOM, DEMO)
    },
    **{
        f"{args[0]} below a file": (config("x"), to("c.yaml/new", args), "c.yaml/new: cannot be written, ")
        for args in (TRAIN, EVALUATE, ROBUSTNESS, CALIBRATE, COMPARE, PREDICT, REPORT, PHANTOM, DEMO)
    },
    **{
        f"{args[0]} onto a device": (
            lambda: None,
            to("/dev/full", args),
            "/dev/full: expected a file or a folder, found a",
        )
        for args in (TRAIN, EVALUATE, ROBUSTNESS, CALIBRATE, COMPARE, PREDICT, REPORT, PHANTOM, DEMO)
    },
    "training onto a data set": (lambda: None, to("data", TRAIN), "data: is not empty; --resume continues"),
    "evaluation onto a run": (
        lambda: None,
        to("run", EVALUATE),
        "run: holds something else than an earlier evaluation",
    ),
    "sweep onto an evaluation": (lambda: None, to("ev", ROBUSTNESS), "ev: holds something else than an earlier robust"),
    "calibration onto a data set": (
        lambda: None,
        to("data/dataset.json", CALIBRATE),
        "data/dataset.json: is something else than an earlier calibration",
    ),
    "comparison onto a data set": (lambda: None, to("data", COMPARE), "data: holds something else than a comparison"),
    "page onto an evaluation": (
        lambda: None,
        to("ev/metrics.json", REPORT),
        "ev/metrics.json: is something else than an earlier page",
    ),
    "page onto a folder": (lambda: None, to("ev", REPORT), "ev: expected a file name, found a folder"),
    "phantoms onto a data set": (lambda: None, to("data", PHANTOM), "data: exists and is not an empty folder"),
    "demo onto a data set": (lambda: None, to("data", DEMO), "data: is taken by something other than a demo"),
    "evaluation cut short": (
        lambda: rewrite(Path("ev/metrics.json"), lambda raw: raw[:500]),
        REPORT,
        "ev: expected an evaluation with metrics.json",
    ),
    "evaluation without a summary": (
        lambda: edit_json("ev/metrics.json", lambda v: {k: x for k, x in v.items() if k != "summary"}),
        REPORT,
        "ev/metrics.json: summary missing; run sure evaluate anew",
    ),
    "evaluation with a word for cases": (
        lambda: edit_json("ev/metrics.json", lambda v: {**v, "cases": "x"}),
        REPORT,
        "ev: not whole evaluations",
    ),
    "evaluation of another program": (
        lambda: edit_json("ev/metrics.json", lambda v: {**v, "kind": "x"}),
        REPORT,
        "metrics.json: not written by sure evaluate",
    ),
    "evaluation of 10^5 brackets": (
        lambda: Path("ev/metrics.json").write_text("[" * 100_000),
        REPORT,
        "ev: expected an evaluation with metrics.json or a sweep (nested too deeply)",
    ),
    "picture elsewhere": (
        lambda: edit_json("ev/metrics.json", lambda v: v["pictures"].update(boundary="../data/dataset.json")),
        REPORT,
        "ev: not whole evaluations",
    ),
    "picture of no bytes": (
        lambda: [p.write_bytes(b"") for p in Path("ev/pictures").glob("*.npz")],
        REPORT,
        "ev: not whole evaluations",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_status_2_and_one_message(name, kit, capsys):
    arrange, args, message = BAD[name]
    arrange()
    before = {p: p.read_bytes() for p in kit.rglob("*") if p.is_file()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err, err
    assert err.startswith("sure: ")
    assert "Traceback" not in err
    assert "Warning" not in err
    assert {p: p.read_bytes() for p in kit.rglob("*") if p.is_file()} == before  # nothing lost, nothing half-written
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


@pytest.mark.parametrize("folder", ["Müller 心臓 🫀", "a b  c", "-x", "%s{0}$HOME", "it's"])
def test_paths_of_any_characters_work(folder, kit, capsys):
    target = Path(folder)
    (target / "in").mkdir(parents=True)
    shutil.copy(image(), target / "in" / "Größe é.nii.gz")
    out = f"./{folder}/out"
    assert main(["predict", "run", f"./{folder}/in", f"--out={out}", "--no-progress"]) == 0
    assert sorted(p.name for p in Path(out).iterdir()) == ["Größe é_seg.nii.gz", "Größe é_unc.nii.gz"]
    assert main(["report", "ev", f"--out=./{folder}/page.html"]) == 0
    capsys.readouterr()


def test_a_constant_image_is_segmented(kit, capsys):
    store(image(), np.zeros(SHAPE, np.int16))
    assert main(["predict", "run", str(image()), "--out", "new", "--no-progress"]) == 0
    assert np.isfinite(nib.load("new/phantom_001_unc.nii.gz").get_fdata()).all()
    capsys.readouterr()


def test_nothing_in_an_evaluation_is_run_by_the_page(kit, capsys):
    name = "<script>alert(1)</script>"
    edit_json("ev/metrics.json", lambda v: {**v, "run": name, "dataset": name, "class_names": [name] * 4})
    assert main(REPORT) == 0
    assert name not in Path("new.html").read_text()
    capsys.readouterr()


# Processes of one server that has loaded everything: what is stopped or limited here are real processes.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["sure.cli", "sure.train", "sure.evaluate", "sure.predict", "sure.report", "sure.robustness"]
)


def child(args: list[str], folder: str, limit: int | None) -> None:
    """`sure` in a process of its own, with its stderr in the file `err`."""
    os.chdir(folder)
    os.dup2(os.open("../err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if limit is not None:  # a write beyond it fails with EFBIG, as one on a full disk does with ENOSPC
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(args))


def start(args: list[str], limit: int | None = None) -> multiprocessing.process.BaseProcess:
    process = SERVER.Process(target=child, args=(args, os.getcwd(), limit))
    process.start()
    return process


def ended(process: multiprocessing.process.BaseProcess) -> tuple[int | None, str]:
    """The exit status and what was said on stderr."""
    process.join(60)
    return process.exitcode, Path("../err").read_text()


def visible(folder: Path) -> dict[Path, bytes]:
    """All files but those whose name, or a folder's, begins with a dot: what was left half-written."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p: p.read_bytes() for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)}


FULL = {
    "train": (TRAIN, 20_000),
    "predict": (PREDICT, 200),
    "evaluate": (to("ev", EVALUATE), 5_000),
    "robustness": (ROBUSTNESS, 2_000),
    "calibrate": (to("run/calibration.json", CALIBRATE), 500),
    "report": (REPORT, 5_000),
    "phantom": (PHANTOM, 5_000),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_leaves_what_was_there(name, kit):
    args, limit = FULL[name]
    before = visible(kit)
    status, err = ended(start(args, limit))
    assert status == 2, err
    assert re.fullmatch(r"sure: [^:\n]*(new|ev|calibration)[^:\n]*: File too large\n", err), err
    after = visible(kit)
    assert {p: after.get(p) for p in before} == before
    torn = {p for p in set(after) - set(before) if len(after[p]) >= limit}
    assert not torn
    assert not [p for p in kit.rglob(".*") if not p.name.endswith(".tmp")]  # no folder half-made
    if name != "train":  # whose folder holds what resumes it
        assert after == before


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_training_that_is_stopped_goes_on(sent, kit):
    args = [*TRAIN[:-3], "--epochs", "400", "--no-progress"]
    process = start(args)
    latest, until = Path("new/checkpoints/latest.pt"), time.monotonic() + 60
    while not latest.is_file() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)  # somewhere in an epoch, or in the write of its checkpoint
    os.kill(process.pid, sent)
    status, err = ended(process)
    assert status == (130 if sent == signal.SIGINT else -signal.SIGKILL), err
    assert "Traceback" not in err
    epoch = torch.load(latest, weights_only=True)["epoch"]
    assert 0 < epoch < 400
    again = start([*args, "--resume"])
    while torch.load(latest, weights_only=True)["epoch"] <= epoch and again.is_alive():
        time.sleep(0.02)
        assert time.monotonic() < until + 60
    again.kill()
    again.join()
    assert torch.load(latest, weights_only=True)["epoch"] > epoch


WRITES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "tempfile.mkdtemp")


class Stop:
    """An audit hook, which Python never takes back: at the n-th write below a folder it does something, once."""

    def __init__(self) -> None:
        self.at, self.seen, self.folder, self.action = -1, 0, "", lambda: None
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.at < 0:
            return
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in WRITES:
            self.seen += 1
            if self.seen == self.at:
                self.at = -1
                self.action()

    def arm(self, at: int, action) -> None:
        self.at, self.seen, self.action = at, 0, action


@pytest.fixture(scope="module")
def stop() -> Stop:
    return Stop()


@pytest.mark.parametrize("args", [[*PREDICT[:2], str(image()), *PREDICT[3:]], to("ev", EVALUATE), REPORT, PHANTOM])
def test_ctrl_c_at_any_write(args, kit, capsys, stop):
    """Nothing that was there is lost, what is new is whole, and nothing else stays."""
    stop.arm(10**9, None)
    before = visible(kit)
    assert main(args) == 0
    writes, whole = stop.seen, visible(kit)
    for at in sorted({1, (writes + 1) // 2, writes - 1, writes}):
        for path in {kit / path.relative_to(kit).parts[0] for path in set(whole) - set(before)}:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        stop.arm(at, lambda: signal.raise_signal(signal.SIGINT))
        status = main(args)
        stop.arm(-1, None)
        err = capsys.readouterr().err
        assert status == 130, (at, err)
        assert "Traceback" not in err
        after = visible(kit)
        assert set(before) <= set(after) <= set(whole), at
        assert {p for p in after if len(after[p]) < min(len(whole[p]), len(before.get(p, whole[p]))) - 64} == set()


@pytest.mark.parametrize("earlier", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("write", ["folder", "file"])
def test_a_kill_at_any_write_leaves_the_old_or_the_new(write, earlier, tmp_path, stop):
    old, new = {"a": "old" * 9, "b": "old"}, {"a": "new" * 9, "c": "new"}
    seen = set()
    for at in range(1, 40):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        if earlier and write == "folder":
            out.mkdir()
            for name, text in old.items():
                (out / name).write_text(text)
        elif earlier:
            out.write_text("old")
        pid = os.fork()
        if not pid:
            stop.arm(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            if write == "folder":
                with atomic_folder(out) as folder:
                    for name, text in new.items():
                        write_text(folder / name, text)
            else:
                write_text(out, "new")
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if write == "folder":
            found = {p.name: p.read_text() for p in out.iterdir()} if out.exists() else None
            assert found in ((old, new) if earlier else (None, new)), at
            state = "new" if found == new else "old"
        else:
            state = out.read_text() if out.exists() else "old"
            assert state in ("old", "new"), at
        seen.add((killed, state))
        if not killed:
            break
    assert (False, "new") in seen
    assert (True, "old") in seen


def test_ctrl_c_while_modules_are_loaded(tmp_path):
    """The one case that takes a fresh interpreter."""
    (tmp_path / "tyro.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "sure", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_the_table_of_the_docs_is_this_one():
    text = DOCS.read_text().partition("### Command line")[2].partition("\n##")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if "|" in line]
    assert rows[2:] == [(name, f"`{message}`", "2") for name, (_, _, message) in BAD.items()]
    assert len(BAD) >= 40
