"""Runs that last: memory that does not grow, and workers whose death is one line."""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sure import train as training
from sure.cli import main
from sure.config import TrainConfig
from sure.data import TrainingData, write_phantoms
from sure.errors import UserError
from sure.train import train

TINY = TrainConfig(patch_size=(16,), channels=(4, 8), folds=5, batch_size=2, good_model_step=0, validate_every=5)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", cases=5, shape=(24, 20, 16))


@pytest.mark.parametrize(
    ("epochs", "options"),
    [
        (12, {"noise": "patches"}),
        # 2 steps an epoch: 500 in all.
        pytest.param(250, {"noise": "patches", "patch_size": (32,)}, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow(phantoms, tmp_path, monkeypatch, epochs, options):
    """As many tensors live after the last epoch as after the sixth, and the process is no larger."""
    seen = []
    real = training._Trainer.save

    def save(self, record):
        real(self, record)
        gc.collect()
        # By type: isinstance would ask proxies of other libraries for their class.
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        seen.append((tensors, int(Path("/proc/self/statm").read_text().split()[1]) * 4096))

    monkeypatch.setattr(training._Trainer, "save", save)
    train(phantoms, tmp_path / "run", replace(TINY, epochs=epochs, **options), device="cpu", progress=False)
    assert len(seen) == epochs
    assert seen[-1][0] == seen[5][0]
    # A batch's logits alone, kept at each step, would be 250 MB in the long run and 5 MB in the short one.
    assert seen[-1][1] - seen[epochs // 3][1] < 60e6


class Deadly(TrainingData):
    """A data set whose process is killed at the third item, as by a machine without memory left."""

    def __getitem__(self, index):
        if index == 2 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Faulty(TrainingData):
    """A data set that finds a file unreadable."""

    def __getitem__(self, index):
        if index == 2:
            raise UserError("phantom_002.nii.gz: truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_pipe_that_breaks_before_the_death_is_known(error, monkeypatch):
    told = iter((None, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")))

    def fails():
        death = next(told, None)
        if death is not None:
            raise death

    monkeypatch.setattr(training, "_error_if_any_worker_fails", fails)
    with pytest.raises(UserError, match=r"has died \(DataLoader worker \(pid 7\)"), training._one_line_worker_errors():
        raise error
    monkeypatch.setattr(training, "_death_of_a_worker", lambda: None)
    with pytest.raises(type(error)), training._one_line_worker_errors():
        raise error


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Deadly, "sure: workers: a process that prepares patches has died (DataLoader worker (pid"),
        (Faulty, "sure: phantom_002.nii.gz: truncated"),
    ],
)
def test_failing_workers_are_one_line(phantoms, tmp_path, monkeypatch, capsys, data, message):
    monkeypatch.setattr(training, "TrainingData", data)
    flags = ["--epochs", "2", "--patch-size", "16", "--channels", "4", "8", "--batch-size", "2", "--no-progress"]
    status = main(["train", str(phantoms), "--out", str(tmp_path / "run"), "--workers", "1", "--device", "cpu", *flags])
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert errors[-1].startswith(message)
    assert not any("Traceback" in line for line in errors)


def test_what_a_worker_may_not_hide(phantoms, tmp_path, monkeypatch):
    """Errors that are none of the user's keep their traceback."""

    class Broken(TrainingData):
        def __getitem__(self, index):
            raise RuntimeError("a bug")

    monkeypatch.setattr(training, "TrainingData", Broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(phantoms, tmp_path / "run", replace(TINY, epochs=2), device="cpu", progress=False)


@pytest.mark.parametrize(("factor", "message"), [(0.0, "evidence has collapsed"), (float("inf"), "NaN or infinite")])
def test_a_run_that_breaks_down_ends_at_its_last_good_checkpoint(
    phantoms, tmp_path, monkeypatch, capsys, factor, message
):
    real = training._Trainer._logits

    def broken(self, image):
        logits = real(self, image)
        return logits * factor - 50 if self.epoch == 1 and self.model.training else logits

    monkeypatch.setattr(training._Trainer, "_logits", broken)
    out = tmp_path / "run"
    flags = ["--epochs", "4", "--patch-size", "16", "--channels", "4", "8", "--batch-size", "2", "--no-progress"]
    assert main(["train", str(phantoms), "--out", str(out), "--device", "cpu", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sure: training diverged")
    assert message in line
    assert "in epoch 1, batch 0 (phantom_" in line
    assert f"the last good checkpoint is {out / 'checkpoints' / 'latest.pt'}" in line
    monkeypatch.undo()
    assert main(["train", str(phantoms), "--out", str(out), "--resume", "--device", "cpu", *flags]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
