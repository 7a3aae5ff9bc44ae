"""Training: what it writes, that it resumes to the bit, that a kill leaves nothing torn, that faults stop it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny_run import write_data

from sure.checkpoint import checkpoint_path, load_run, read_checkpoint
from sure.config import TrainConfig, from_dict, load_config, load_preset, presets, to_dict
from sure.data import IGNORE, write_phantoms
from sure.errors import UserError
from sure.evaluate import evaluate
from sure.files import atomic
from sure.models import build_model, checkpoint_activations
from sure.objective import build_objective
from sure.train import _learning_rate, train

TINY = TrainConfig(
    patch_size=(16,), channels=(4, 8), folds=3, epochs=4, batch_size=2, dropout=0.1, validate_every=2, lr=1e-2
)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", cases=6, shape=(24, 20, 16))


def weights(run: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return read_checkpoint(checkpoint_path(run, name))["model"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def finished(phantoms, tmp_path_factory) -> Path:
    return train(phantoms, tmp_path_factory.mktemp("runs") / "run", TINY, device="cpu", progress=False)


def test_a_run_folder(finished):
    names = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "run.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints/latest.pt",
        "checkpoints/best.pt",
        "checkpoints/final.pt",
    } <= names
    assert any(name.startswith("tensorboard/") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert load_config(finished / "config.yaml") == TINY
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1, 2, 3]
    assert {"loss", "ace", "kl", "dice", "gradient", "far", "lr"} <= set(records[0])
    assert "mean dice" in records[1]
    assert "mean dice" not in records[2]
    # Supervision begins after 30 % of the epochs.
    assert records[1]["far"] == 0
    assert records[2]["far"] > 0
    run = load_run(finished)
    assert run.num_classes == 4
    assert run.epoch == 4
    assert len(run.held_out) == 2
    assert not run.model.training


def test_the_loss_goes_down(phantoms, tmp_path):
    config = replace(TINY, loss="edl", epochs=12, validate_every=0, dropout=0.0, annealing_steps=0)
    run = train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


NOISED = {"loss": "sure", "ranking": "exact", "good_model_step": 1}
SETTINGS = {
    "sure": {"loss": "sure"},
    "edl": {"loss": "edl"},
    "dice_ce": {"loss": "dice_ce"},
    "patches": {**NOISED, "noise": "patches"},
    "images": {**NOISED, "noise": "images", "within_class": True},
    "soft": {**NOISED, "noise": "images", "soft": "isic"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_gives_the_same_weights(phantoms, tmp_path, monkeypatch, name):
    config = replace(TINY, **SETTINGS[name], accumulate=2)
    whole = train(phantoms, tmp_path / "whole", config, device="cpu", progress=False)
    interrupted = tmp_path / "interrupted"
    calls = 0

    class Interrupt(BaseException):
        pass

    from sure import train as module

    class Board(module.SummaryWriter):
        def add_scalar(self, tag, value, step, *args, **kwargs):
            nonlocal calls
            calls += 1
            if step == 2:  # after the metrics of epoch 2, before its checkpoint
                raise Interrupt
            return super().add_scalar(tag, value, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "SummaryWriter", Board)
        with pytest.raises(Interrupt):
            train(phantoms, interrupted, config, device="cpu", progress=False)
    assert calls
    assert not checkpoint_path(interrupted, "final").exists()
    torch.randn(7)  # the global stream's state must not matter
    train(phantoms, interrupted, config, resume=True, device="cpu", progress=False)
    for name in ("final", "best", "latest"):
        assert_same(weights(interrupted, name), weights(whole, name))
    drop = ("seconds",)
    records = [
        [{k: v for k, v in json.loads(line).items() if k not in drop} for line in (r / "metrics.jsonl").open()]
        for r in (interrupted, whole)
    ]
    assert records[0] == records[1]
    # Resuming a finished run changes nothing.
    train(phantoms, interrupted, config, resume=True, device="cpu", progress=False)
    assert_same(weights(interrupted), weights(whole))


def test_killed_at_any_moment(phantoms, finished, tmp_path):
    """SIGKILL at arbitrary times, resumed until done: every checkpoint met on the way loads, the end is the same."""
    run = tmp_path / "run"
    flags = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in to_dict(TINY).items()
        if key in ("folds", "epochs", "batch_size", "dropout", "validate_every", "lr")
    ]
    command = [
        *(sys.executable, "-m", "sure", "train", str(phantoms), "--out", str(run), "--resume", "--no-progress"),
        *(*flags, "--patch-size", "16", "--channels", "4", "8", "--device", "cpu"),
    ]
    kills = 0
    for extra in (0.0, 0.3, 0.6, None):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if extra is None:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
            break
        seen = checkpoint_path(run, "latest").stat().st_mtime_ns if checkpoint_path(run, "latest").exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            path = checkpoint_path(run, "latest")
            if path.exists() and path.stat().st_mtime_ns != seen:
                break
            time.sleep(0.01)
        time.sleep(extra)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        process.stderr.close()
        for name in ("latest", "best", "final"):
            if checkpoint_path(run, name).exists():
                assert "model" in read_checkpoint(checkpoint_path(run, name))
    assert kills
    assert_same(weights(run), weights(finished))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def attempt() -> None:
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        attempt()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_taken_and_foreign_folders_are_left_alone(phantoms, finished, tmp_path):
    with pytest.raises(UserError, match="is not empty; --resume"):
        train(phantoms, finished, TINY, device="cpu", progress=False)
    with pytest.raises(UserError, match=r"cannot resume another run: lr was 0\.01, is 0\.5"):
        train(phantoms, finished, replace(TINY, lr=0.5), resume=True, device="cpu", progress=False)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("text")
    with pytest.raises(UserError, match=r"not a run folder.*chapter1\.tex"):
        train(phantoms, foreign, TINY, resume=True, device="cpu", progress=False)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="expected a folder, found a file"):
        train(phantoms, file, TINY, device="cpu", progress=False)


def damaged(phantoms: Path, tmp_path: Path) -> Path:
    """The phantoms with a truncated image, NaN voxels and a label off its grid."""
    import shutil

    root = Path(shutil.copytree(phantoms, tmp_path / "damaged"))
    images = sorted((root / "imagesTr").glob("*.nii.gz"))
    images[0].write_bytes(images[0].read_bytes()[:2000])
    image = nib.load(images[1])
    values = image.get_fdata().astype(np.float32)
    values[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(values, image.affine), images[1])
    label = root / "labelsTr" / images[2].name
    nib.save(nib.Nifti1Image(np.asarray(nib.load(label).dataobj)[:-1], nib.load(label).affine), label)
    return root


def test_faulty_data_stops_before_anything_is_written(phantoms, tmp_path):
    root = damaged(phantoms, tmp_path)
    out = tmp_path / "run"
    with pytest.raises(UserError) as error:
        train(root, out, TINY, device="cpu", progress=False)
    names = sorted(p.name for p in (root / "imagesTr").glob("*.nii.gz"))
    for name in names[:3]:
        assert name in str(error.value)
    assert names[3] not in str(error.value)
    assert "3 faults" in str(error.value)
    assert not out.exists()
    run = train(root, out, replace(TINY, epochs=2), skip_bad=True, device="cpu", progress=False)
    experiment = json.loads((run / "run.json").read_text())
    assert len(experiment["train"]) + len(experiment["held_out"]) == 3


def test_classes_with_a_gap_after_skipping_are_refused(tmp_path):
    """The case left out held the only voxels of class 2."""
    root = write_data(tmp_path / "data", 4)
    for i in range(4):
        path = root / f"labels/case_{i}.nii.gz"
        label = nib.load(path)
        values = np.asarray(label.dataobj).copy()
        values[values == 2] = 3
        if i == 0:
            values[values.nonzero()[0][:3], 5, 5] = 2
        nib.save(nib.Nifti1Image(values, label.affine), path)
    image = nib.load(root / "images/case_0.nii.gz")
    broken = image.get_fdata().astype(np.float32)
    broken[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(broken, image.affine), root / "images/case_0.nii.gz")
    with pytest.raises(UserError, match=r"without these cases 3 faults are left(.|\n)*0 to 1 without gaps, found 3"):
        train(root, tmp_path / "run", TINY, skip_bad=True, device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_data_are_known_by_more_than_their_names(phantoms, finished, tmp_path):
    """The same under another path is the same; others of the same names are not."""
    begun = tmp_path / "run"
    shutil.copytree(finished, begun)
    checkpoint_path(begun, "final").unlink()
    moved = shutil.copytree(phantoms, tmp_path / "moved")
    train(moved, begun, TINY, resume=True, device="cpu", progress=False)
    images = sorted((moved / "imagesTr").glob("*.nii.gz"))
    image = nib.load(images[0])
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.float32) + 1, image.affine), images[0])
    with pytest.raises(UserError, match="cannot resume another run: files of the data set changed"):
        train(moved, begun, TINY, resume=True, device="cpu", progress=False)
    older = json.loads((begun / "run.json").read_text())
    del older["files"]
    (begun / "run.json").write_text(json.dumps(older))
    train(moved, begun, TINY, resume=True, device="cpu", progress=False)


def test_validation_counts_what_evaluation_counts(phantoms, finished, tmp_path):
    run = load_run(finished)
    report = evaluate(finished, phantoms, tmp_path / "eval", pictures=0, progress=False)
    config = replace(TINY, epochs=TINY.epochs, validate_every=1)
    again = train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    last = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])
    for name in run.class_names[1:]:
        assert last[f"dice {name}"] == pytest.approx(report["summary"][f"dice/{name}"]["mean"])


def test_warm_start(phantoms, finished, tmp_path):
    config = replace(TINY, epochs=2, lr=1e-12, warm_start=checkpoint_path(finished, "final"))
    run = train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    for key, value in weights(run).items():
        torch.testing.assert_close(value, weights(finished)[key], atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="was trained on 2 cases that this fold holds out"):
        train(phantoms, tmp_path / "fold", replace(config, fold=1), device="cpu", progress=False)
    moved = shutil.copytree(phantoms, tmp_path / "moved")
    for same in (phantoms / ".." / phantoms.name, moved):
        with pytest.raises(UserError, match="was trained on 2 cases that this fold holds out"):
            train(same, tmp_path / "fold", replace(config, fold=1), device="cpu", progress=False)
    other = replace(config, channels=(4, 16))
    with pytest.raises(UserError, match=r"final\.pt: weights do not fit"):
        train(phantoms, tmp_path / "other", other, device="cpu", progress=False)
    assert not (tmp_path / "other").exists()


def test_checkpoints_execute_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/boom",))

    path = tmp_path / "bomb.pt"
    torch.save({"model": Bomb()}, path)
    with pytest.raises(UserError, match=r"bomb\.pt: not a checkpoint that can be loaded safely"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "boom").exists()


def test_a_loss_that_is_not_finite_stops_the_run(phantoms, tmp_path, monkeypatch):
    from sure import train as module

    real = module.build_objective

    def poisoned(*settings):
        objective = real(*settings)
        inner = objective.forward

        def forward(*args, **options):
            loss, terms = inner(*args, **options)
            return loss * float("nan"), terms

        objective.forward = forward
        return objective

    monkeypatch.setattr(module, "build_objective", poisoned)
    with pytest.raises(UserError, match=r"loss is nan in epoch 0, batch 0 \(phantom_\d+, phantom_\d+\)"):
        train(phantoms, tmp_path / "run", TINY, device="cpu", progress=False)


@pytest.mark.parametrize(("epochs", "message"), [(1, "weights are no longer finite|logits are NaN"), (5, "diverged")])
def test_a_run_that_diverges_leaves_no_poisoned_checkpoint(phantoms, tmp_path, epochs, message):
    config = replace(TINY, loss="edl", epochs=epochs, lr=1e36, clip=None, validate_every=0)
    with pytest.raises(UserError, match=message):
        train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    for path in (tmp_path / "run").glob("checkpoints/*.pt"):
        assert all(bool(torch.isfinite(v).all()) for v in read_checkpoint(path)["model"].values())


@pytest.mark.parametrize("model", ["unet", "attention_unet", "segresnet", "dynunet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_networks(model, dims):
    config = TrainConfig(spatial_dims=dims, model=model, channels=(8, 16, 32), patch_size=(16,))
    logits = build_model(config, 2, 3)(torch.randn((2, 2, *(16,) * dims)))
    assert logits.shape == (2, 3, *(16,) * dims)


class Recorder(torch.nn.Module):
    """A network with batch normalisation that counts its calls."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3, padding=1), torch.nn.BatchNorm3d(3))
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        return self.layers(image)


def noisy_batch():
    torch.manual_seed(0)
    label = torch.zeros((2, 1, 12, 12, 12), dtype=torch.uint8)
    label[:, :, 3:8, 3:8, 3:8] = 1
    label[:, :, 5:7, 5:7, 5:7] = 2
    label[0, 0, 0] = IGNORE
    return torch.randn((2, 1, 12, 12, 12)), label


@pytest.mark.parametrize(("noise", "passes"), [("off", 1), ("patches", 4), ("images", 3)])
def test_noised_passes_supervise_from_their_epoch_on(noise, passes):
    config = TrainConfig(loss="sure", epochs=10, good_model_step=5, patch_size=(12,), channels=(4, 8), noise=noise)
    objective, network = build_objective(config), Recorder()
    image, label = noisy_batch()
    for epoch, expected in ((4, 1), (9, passes)):
        objective.set_epoch(epoch)
        network.calls = 0
        loss, terms = objective(network(image), label, image, network)
        loss.backward()
        assert network.calls == expected
        assert (float(terms["mu"]) > 0) == (expected > 1)


@pytest.mark.parametrize("statistics", ["frozen", "updated"])
def test_running_statistics_see_noise_only_where_asked(phantoms, tmp_path, statistics, monkeypatch):
    """With frozen statistics they are those of the clean batches alone, the weights being the same."""
    config = replace(
        TINY, loss="sure", epochs=1, good_model_step=0, validate_every=0, norm="batch", dropout=0.0, lr=1e-12
    )
    seen = {}
    for noise in ("off", "patches"):
        settings = replace(config, noise=noise, noise_statistics=statistics)
        run = train(phantoms, tmp_path / noise, settings, device="cpu", progress=False)
        seen[noise] = {k: v for k, v in weights(run).items() if "running" in k or "tracked" in k}
    assert seen["off"]
    same = all(torch.allclose(seen["off"][k], seen["patches"][k], atol=1e-6) for k in seen["off"])
    assert same == (statistics == "frozen")


def test_presets_are_settings():
    assert presets() == ["prius-acdc", "prius-whs", "sure-acdc", "sure-refuge"]
    for name in presets():
        config = load_preset(name)
        assert config.loss == "sure"
        build_objective(config)
        build_model(config, 1, 4)
    acdc = load_preset("sure-acdc")
    published = (acdc.batch_size, acdc.lr, acdc.epochs, acdc.good_model_step, acdc.kl_epochs, acdc.ace_weight)
    assert published == (24, 1e-3, 100, 30, 20, 10.0)
    with pytest.raises(UserError, match="preset: expected one of prius-acdc"):
        load_preset("acdc")


@pytest.mark.parametrize("loss", ["sure", "edl", "dice_ce"])
def test_objectives_leave_padding_out(loss):
    objective = build_objective(TrainConfig(loss=loss, epochs=10))
    objective.set_epoch(9)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 3, 8, 8, 8), generator=g, requires_grad=True)
    label = torch.zeros((2, 1, 8, 8, 8), dtype=torch.uint8)
    label[..., 4:] = 1
    label[..., 2:6, :2, :] = 255
    value, terms = objective(logits, label, torch.randn((2, 1, 8, 8, 8), generator=g))
    value.backward()
    padding = (label == 255).expand_as(logits)
    assert bool((logits.grad[padding] == 0).all())
    assert bool((logits.grad[~padding] != 0).any())
    assert all(not t.requires_grad for t in terms.values())


def test_training_runs_the_fused_op(phantoms, tmp_path):
    config = replace(TINY, epochs=2, validate_every=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    names = {event.key for event in profile.key_averages()}
    assert {"sure_kernels::supervised_sums", "sure_kernels::supervised_gradient"} <= names


def test_2d_training(phantoms, tmp_path):
    config = replace(TINY, spatial_dims=2, epochs=2, validate_every=1)
    run = train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    assert load_run(run).config.spatial_dims == 2


def test_half_precision_training(phantoms, tmp_path):
    run = train(phantoms, tmp_path / "run", replace(TINY, epochs=2, amp="bf16"), device="cpu", progress=False)
    assert load_run(run, checkpoint="latest").epoch == 2


def test_published_learning_rates(golden):
    published = golden("14_schedules")["lr_prius"]
    config = load_preset("prius-acdc")
    assert [round(_learning_rate(config, epoch), 8) for epoch in range(config.epochs)] == published.tolist()


class TestConfig:
    def test_round_trip(self, tmp_path):
        import yaml

        config = replace(TINY, prior=(0.5, 1.0), warm_start=Path("x.pt"), clip=None)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
        assert load_config(tmp_path / "c.yaml") == config

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"epoch": 3}, "unknown keys epoch"),
            ({"margin": 1.5}, "margin: expected at most 1"),
            ({"margin": 0.2, "ranking": "exact"}, "margin: expected .*ranking correlation with it, got 0.2 with exact"),
            ({"epochs": "many"}, "epochs: expected int, got 'many'"),
            ({"epochs": True}, "epochs: expected int"),
            ({"loss": "ce"}, "loss: expected one of sure, edl, dice_ce, got 'ce'"),
            ({"epochs": 0}, "epochs: expected at least 1, got 0"),
            ({"fold": 5}, "fold: expected 0 <= fold < folds"),
            ({"patch_size": [30]}, "patch_size: expected multiples of 4"),
            ({"patch_size": [16, 16]}, "patch_size: expected 1 or 3 numbers"),
            ({"prior": [0.0]}, "prior: expected entries of at least"),
            ({"good_model_step": 100}, "good_model_step: expected less than epochs, 100, got 100"),
            ({"near": 0.5}, "boundary, near, far"),
            ({"seed": -1}, "seed: expected 0 or more"),
            ({"seed": 2**63}, r"seed: expected a 64-bit number"),
            ({"lr": float("nan")}, "lr: expected finite numbers"),
            ({"weight_decay": -1.0}, "weight_decay: expected finite numbers of at least 0"),
            ({"prior": [float("nan")]}, "prior: expected finite numbers"),
            ({"patch_size": 4}, "patch_size: expected multiples of 4 from 8 on"),
            ({"model": "segresnet", "channels": [8, 24]}, "channels: segresnet expects"),
            ({"model": "dynunet", "channels": [8, 16]}, "channels: dynunet has at least 3"),
        ],
    )
    def test_mistakes_are_named(self, values, message):
        with pytest.raises(UserError, match=message):
            from_dict(values)

    def test_what_a_setting_follows_from_is_not_blamed(self):
        with pytest.raises(UserError, match=r"expected at least 1, got 0$"):
            from_dict({"epochs": 0})

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("soft: off\nnoise: off\namp: off\naugment: off", {"augment": False}),
            ("noise: images\nsoft: acdc", {"noise": "images", "soft": "acdc"}),
            ("lr: 4e-3\nweight_decay: 1E2", {"lr": 0.004, "weight_decay": 100.0}),
            ("patch-size: 32\ngood-model-step: 3", {"patch_size": (32,), "good_model_step": 3}),
            ("clip: none\ngood_model_step: None\nmargin: null\n", {"clip": None}),
        ],
    )
    def test_yaml_may_spell_settings_as_people_do(self, tmp_path, text, expected):
        (tmp_path / "c.yaml").write_text(text)
        assert load_config(tmp_path / "c.yaml") == replace(TrainConfig(), **expected)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("patch-size: 32\npatch_size: 16", "c.yaml: patch-size is set twice, once with - and once with _"),
            ("loss: off", "c.yaml: loss: expected one of sure, edl, dice_ce, got False"),
            ("patch size: 32", "c.yaml: unknown keys patch size"),
            ("lr: 4e", "c.yaml: lr: expected float, got '4e'"),
        ],
    )
    def test_what_yaml_spells_otherwise_is_named(self, tmp_path, text, message):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("model", "norm"),
    [("unet", "batch"), ("attention_unet", "auto"), ("segresnet", "auto"), ("dynunet", "batch")],
)
def test_checkpointed_activations_change_memory_alone(model, norm):
    """The same logits, gradients and running statistics, from less that autograd keeps."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = TrainConfig(model=model, norm=norm, channels=(8, 16, 32), patch_size=(16,), dropout=0.1)
        network = build_model(config, 1, 3)
        if checkpointed:
            checkpoint_activations(network)
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        image = torch.randn((2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = network(image)
            loss = logits.square().mean()
        before = kept
        loss.backward()
        found.append((network.state_dict(), [p.grad for p in network.parameters()], logits.detach(), before))
    (state, gradients, logits, kept), (state_again, gradients_again, logits_again, kept_again) = found
    assert state.keys() == state_again.keys()
    torch.testing.assert_close(logits_again, logits, rtol=0, atol=0)
    torch.testing.assert_close(state_again, state, rtol=0, atol=0)
    torch.testing.assert_close(gradients_again, gradients)
    assert kept_again < 0.5 * kept


def test_cache_and_checkpointed_activations_train_to_the_same_weights(phantoms, finished, tmp_path):
    config = replace(TINY, checkpoint_activations=True)
    run = train(phantoms, tmp_path / "run", config, device="cpu", cache=tmp_path / "cache", progress=False)
    for key, value in weights(run).items():
        torch.testing.assert_close(value, weights(finished)[key])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_trains_to_the_same_weights(phantoms, tmp_path, monkeypatch, backend):
    """The quick case compiles to a graph that runs as it is, the long one to machine code."""
    config = replace(TINY, epochs=1, dropout=0.0, optimizer="sgd", lr=1e-3)
    plain = train(phantoms, tmp_path / "plain", config, device="cpu", progress=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run = train(phantoms, tmp_path / "run", replace(config, compile=True), device="cpu", progress=False)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[key], value, rtol=1e-4, atol=1e-6)
