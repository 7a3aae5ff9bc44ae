"""Training in several processes: the same weights as in one, one writer, and an end where one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monai.losses import DiceCELoss

from sure import train as training
from sure.checkpoint import checkpoint_path, read_checkpoint
from sure.config import TrainConfig
from sure.data import IGNORE, write_phantoms
from sure.distributed import Processes, local_part, shard
from sure.errors import SharedError, UserError
from sure.models import build_model
from sure.objective import build_objective
from sure.train import train

# 5 cases are trained on: the last batch has one, and the second process fills it up.
TINY = TrainConfig(
    patch_size=(16,),
    channels=(4, 8),
    folds=6,
    epochs=3,
    batch_size=4,
    validate_every=1,
    optimizer="sgd",  # Adam divides by the gradient's size: where that is 0 but for rounding, anything follows
    lr=1e-3,
    good_model_step=0,
)
RUNS = {
    "covariance": (TINY, {}),
    "exact": (replace(TINY, ranking="exact", accumulate=2), {}),
    "dice_ce": (replace(TINY, loss="dice_ce"), {}),
    "soft": (replace(TINY, soft="acdc", epochs=1), {}),
    "fsdp": (TINY, {"fsdp": True}),
    "noise": (replace(TINY, noise="patches", norm="batch", epochs=1), {}),
    "fsdp noise": (replace(TINY, noise="images", epochs=1), {"fsdp": True}),
    "attention_unet": (replace(TINY, model="attention_unet", epochs=1), {}),
    "segresnet": (
        replace(TINY, model="segresnet", channels=(8, 16), epochs=1, checkpoint_activations=True),
        {"fsdp": True},
    ),
    "dynunet": (replace(TINY, model="dynunet", channels=(4, 8, 16), epochs=1, checkpoint_activations=True), {}),
}
COMPARED = ("covariance", "exact", "dice_ce", "fsdp", "segresnet", "dynunet")  # the others draw noise, or normalise


class Interrupt(Exception):
    """Stands for anything that ends a process."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", cases=6, shape=(24, 20, 16))


def weights(run: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return read_checkpoint(checkpoint_path(run, name))["model"]


def interrupted_after(epochs: int, data: Path, out: Path, config: TrainConfig, **options) -> None:
    """Train and stop, all processes alike, when so many epochs are saved."""
    real = training._Trainer.save

    def save(self, record):
        real(self, record)
        if self.epoch == epochs:
            raise Interrupt

    training._Trainer.save = save
    try:
        train(data, out, config, device="cpu", progress=False, **options)
    except Interrupt:
        pass
    finally:
        training._Trainer.save = real


def one_rank(rank: int, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for name, (config, options) in RUNS.items():
        train(data, folder / name, config, device="cpu", progress=False, cache=folder / "cache", **options)
    model = build_model(TINY, 1, 4)
    shard(model, dist.group.WORLD)
    sizes = [sum(part(p).numel() for p in model.parameters()) for part in (local_part, torch.Tensor.detach)]
    (folder / f"sizes {rank}").write_text(json.dumps(sizes))
    interrupted_after(1, data, folder / "resumed", TINY)
    train(data, folder / "resumed", TINY, device="cpu", progress=False, resume=True, fsdp=True)
    for config in (replace(TINY, batch_size=3), replace(TINY, fold=5)):  # not to be shared; not the run to resume
        try:
            train(data, folder / "resumed", config, device="cpu", progress=False, resume=True)
        except SharedError as error:
            (folder / f"refused {config.batch_size} {rank}").write_text(str(error))
    real = training._Trainer._logits

    def broken(self, image):
        logits = real(self, image)
        if self.epoch == 1:
            if mode == "nan" and rank == 1:
                return logits * torch.tensor([float("nan"), *(1.0,) * (len(logits) - 1)]).view(-1, 1, 1, 1, 1)
            if mode == "dead":
                return logits * 0 - 50
            if mode == "raise" and rank == 1:
                raise UserError("boom")
        return logits

    training._Trainer._logits = broken
    for mode in ("nan", "dead", "raise"):
        began = time.monotonic()
        try:
            train(data, folder / mode, TINY, device="cpu", progress=False)
        except (UserError, RuntimeError) as error:
            (folder / f"{mode} {rank}").write_text(f"{type(error).__name__} {error}")
        assert time.monotonic() - began < 60
    os._exit(0)  # without the group's farewell, which would wait for the other one


@pytest.fixture(scope="module")
def both(phantoms, tmp_path_factory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(one_rank, (phantoms, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_end_with_the_weights_of_one(both, phantoms, tmp_path, name):
    config, _ = RUNS[name]
    alone = train(phantoms, tmp_path / "run", config, device="cpu", progress=False)
    found, expected = weights(both / name), weights(alone)
    assert found.keys() == expected.keys()
    start = torch.cat([v.flatten() for v in expected.values()])
    torch.testing.assert_close(torch.cat([v.flatten() for v in found.values()]), start, rtol=1e-5, atol=1e-6)
    records = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (both / name, alone)]
    assert len(records[0]) == config.epochs
    for two, one in zip(*records, strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


def test_every_form_trains(both):
    for name, (config, _) in RUNS.items():
        assert read_checkpoint(checkpoint_path(both / name, "latest"))["epoch"] == config.epochs
        assert all(bool(torch.isfinite(v).all()) for v in weights(both / name).values())
        assert json.loads((both / name / "environment.json").read_text())["processes"] == 2


def test_fsdp_shares_the_weights_out(both):
    (mine, whole), (theirs, _) = (json.loads((both / f"sizes {rank}").read_text()) for rank in range(2))
    assert mine + theirs == whole
    assert max(mine, theirs) < 0.8 * whole


def test_resumed_in_another_form(both):
    """One epoch with DDP and the rest with FSDP are all with either."""
    found, expected = weights(both / "resumed"), weights(both / "covariance")
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def test_refusals_are_those_of_all(both):
    for rank in range(2):
        assert (both / f"refused 3 {rank}").read_text() == "batch_size: expected a multiple of the 2 processes, got 3"
        assert "cannot resume another run: fold was 0, is 5" in (both / f"refused 4 {rank}").read_text()


def test_one_that_fails_ends_the_others(both):
    assert (both / "raise 1").read_text() == "UserError boom"
    assert "lost another process of the run, whose own message says why" in (both / "raise 0").read_text()
    assert (both / "nan 0").read_text() == (both / "nan 1").read_text()
    message = (both / "nan 0").read_text()
    # One of the two images of the second process, in the first batch.
    assert "SharedError training diverged: logits are NaN or infinite in epoch 1, batch 0 (" in message
    assert message.count("phantom") == 1
    assert f"the last good checkpoint is {both / 'nan'}" in message
    assert "evidence has collapsed: no voxel has any left in epoch 1" in (both / "dead 1").read_text()
    for mode in ("nan", "dead", "raise"):
        assert read_checkpoint(checkpoint_path(both / mode, "latest"))["epoch"] == 1


def test_torchrun_trains_the_phantoms(phantoms, tmp_path):
    run = tmp_path / "run"
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "sure",
            "train",
        ),
        *(str(phantoms), "--out", str(run), "--folds", "6", "--epochs", "2", "--batch-size", "2", "--patch-size", "16"),
        *("--channels", "4", "8", "--device", "cpu", "--no-progress"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    # gloo of torch 2.8 says on stdout whom it is connected to.
    assert [line for line in done.stdout.splitlines() if not line.startswith("[Gloo] ")] == [str(run)]
    assert read_checkpoint(checkpoint_path(run, "latest"))["epoch"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed(phantoms, tmp_path):
    """Not after a timeout: the others learn it from their broken connections, and torchrun from its children."""
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "sure", "train", str(phantoms), "--out", str(run), "--folds", "6", "--epochs", "100000"),
        *("--batch-size", "2", "--patch-size", "16", "--channels", "4", "8", "--device", "cpu", "--no-progress"),
    ]
    torchrun = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not checkpoint_path(run, "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        ranks = {}
        for child in children:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
        os.kill(ranks[1], signal.SIGKILL)
        assert torchrun.wait(60) == 1
        assert not Path(f"/proc/{ranks[0]}").exists()
    finally:
        torchrun.terminate()
        torchrun.wait(60)
    assert read_checkpoint(checkpoint_path(run, "latest"))["epoch"] > 0


def test_half_set_environments_and_other_commands(phantoms, tmp_path, monkeypatch, capsys):
    from sure.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE: is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        train(phantoms, tmp_path / "run", TINY, device="cpu", progress=False)
    assert not (tmp_path / "run").exists()
    assert main(["evaluate", str(tmp_path), str(phantoms), "--out", str(tmp_path / "e")]) == 2
    assert "`sure evaluate` runs in one process, found WORLD_SIZE=2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE: expected a number of processes, got 'two'"):
        train(phantoms, tmp_path / "run", TINY, device="cpu", progress=False)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="fsdp: expected several processes"):
        train(phantoms, tmp_path / "run", TINY, device="cpu", progress=False, fsdp=True)


def test_shards_cover_an_order_once_but_for_what_fills_up():
    order = torch.utils.data.SequentialSampler(range(7))
    parts = [list(training._Shard(order, Processes(rank, 3))) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]
    assert [len(training._Shard(order, Processes(rank, 3))) for rank in range(3)] == [3, 3, 3]
    assert list(training._Shard(torch.utils.data.SequentialSampler(range(1)), Processes(3, 4))) == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dice_ce_sums_half_precision_in_float32(dtype):
    """More voxels than float16 counts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 3, 48, 48, 48), generator=generator).to(dtype)
    label = torch.randint(0, 3, (1, 1, 48, 48, 48), generator=generator)
    objective = build_objective(TrainConfig(loss="dice_ce"))
    value, terms = objective(logits, label, logits)
    expected, exact = objective(logits.float(), label, logits)
    assert torch.equal(value, expected)
    assert terms == exact


def test_dice_ce_is_monais():
    """Summed here, so that it may run over the ranks; a batch without padding is what MONAI's own covers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 3, 6, 5, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (2, 1, 6, 5, 4), generator=generator)
    value, _ = build_objective(TrainConfig(loss="dice_ce"))(logits, label, logits)
    (gradient,) = torch.autograd.grad(value, logits)
    expected = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)(logits, label)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    padded = torch.cat((label, torch.full_like(label, IGNORE)))
    doubled, _ = build_objective(TrainConfig(loss="dice_ce"))(torch.cat((logits, logits)), padded, logits)
    torch.testing.assert_close(doubled, value)
