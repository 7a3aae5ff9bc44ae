"""Stateful metrics over two processes equal one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sure_kernels import metrics


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probability = torch.softmax(torch.randn(3, 4, 6, 5, generator=generator), 1)
    return probability, torch.randint(4, (3, 6, 5), generator=generator)


def scores(part: slice, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    probability, target = (t[part] for t in batch())
    ece, curve = metrics.ExpectedCalibrationError(num_classes=4), metrics.ReliabilityCurve()
    brier, ueo = metrics.BrierScore(), metrics.UncertaintyErrorOverlap()
    for state in (ece, curve, brier):
        state.update(probability, target)
    ueo.update(1 - probability.amax(1, keepdim=True), probability.argmax(1) != target)
    return [ece.compute(group), *curve.compute(group), brier.compute(group), ueo.compute(group)]


def work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(scores(slice(0, 1) if rank == 0 else slice(1, 3), dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    expected = scores(slice(None), None)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=1e-12)
