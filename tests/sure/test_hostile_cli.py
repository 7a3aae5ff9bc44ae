"""What a careless or malicious user gives the command line: one message, status 2, nothing written; or it works.

docs/reliability.md lists these cases; a test holds the two to each other.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
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

from sure.cli import main

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
    assert main(["evaluate", run, data, "--out", ev, "--pictures", "1", "--no-progress"]) == 0
    return root


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
    # runs and checkpoints
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
        "config.yaml: no such network can be built",
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
        "/proc/new: No such file or directory",
    ),
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


def start(args: list[str], limit: int | None = None) -> subprocess.Popen[str]:
    def before() -> None:
        if limit is not None:  # a write beyond it fails with EFBIG, as one on a full disk does with ENOSPC
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "sure", *args], stderr=subprocess.PIPE, text=True, preexec_fn=before, env=environment
    )


def test_a_write_that_fails_leaves_what_was_there(kit):
    Path("new").mkdir()
    old = Path("new/phantom_000_seg.nii.gz")
    old.write_bytes(b"old")
    process = start(PREDICT, limit=200)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "File too large" in err
    assert "Traceback" not in err
    assert [p.name for p in Path("new").iterdir()] == [old.name]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_training_that_is_stopped_goes_on(sent, kit, capsys):
    args = ["train", "data", "--out", "new", *TINY]
    args[args.index("--epochs") + 1] = "400"
    process = start(args)
    latest, until = Path("new/checkpoints/latest.pt"), time.monotonic() + 60
    while not latest.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # somewhere in an epoch, or in the write of its checkpoint
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), err
    assert "Traceback" not in err
    epoch = torch.load(latest, weights_only=True)["epoch"]
    assert 0 < epoch < 400
    again = start([*args, "--resume"])
    while torch.load(latest, weights_only=True)["epoch"] <= epoch and again.poll() is None:
        time.sleep(0.05)
        assert time.monotonic() < until + 60
    again.kill()
    again.communicate()
    assert torch.load(latest, weights_only=True)["epoch"] > epoch


def test_the_table_of_the_docs_is_this_one():
    text = DOCS.read_text().partition("### Command line")[2].partition("###")[0]
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines() if "|" in line]
    assert rows[2:] == [(name, f"`{message}`", "2") for name, (_, _, message) in BAD.items()]
    assert len(BAD) >= 40
