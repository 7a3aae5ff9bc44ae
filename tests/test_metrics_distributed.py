"""Stateful metrics over two processes with unequal shares equal one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils import _pytree as pytree

from sure_kernels import metrics
from sure_kernels.metrics.detection import PooledErrors

CASES = 5


def batch() -> tuple[torch.Tensor, ...]:
    """Probability, target, uncertainty, error, a second map and distances; the first case has nothing that counts."""
    generator = torch.Generator().manual_seed(0)
    # No exponentials: their last bit depends on how many threads share a tensor.
    probability = torch.rand(CASES, 4, 6, 5, generator=generator).square()
    probability /= probability.sum(1, keepdim=True)
    target = torch.randint(4, (CASES, 6, 5), generator=generator)
    target[0] = -100
    uncertainty, other = torch.rand(2, CASES, 1, 6, 5, generator=generator)
    return probability, target, uncertainty, uncertainty[:, 0] > other[:, 0], other, 8 * other


def states() -> dict[str, object]:
    found: dict[str, object] = {"one pass": metrics.CalibrationErrorDetection(4)}
    for twin in (metrics.ReliabilityCurve, metrics.ExpectedCalibrationError, metrics.AdaptiveCalibrationError):
        found |= {f"{twin.__name__} {k}": twin(num_bins=7, num_classes=k) for k in (None, 4)}
    for twin in (metrics.BrierScore, metrics.NegativeLogLikelihood):
        found |= {f"{twin.__name__} {k}": twin(num_classes=k) for k in (None, 4)}
    detection = (metrics.ErrorDetectionAUROC, metrics.ErrorDetectionAUPRC, metrics.AreaUnderRiskCoverage)
    for twin in (*detection, metrics.UncertaintyErrorOverlap):
        found[twin.__name__] = twin()
    found |= {twin.__name__: twin() for twin in (metrics.UncertaintyCorrelation, metrics.UncertaintyRatio)}
    return found | {"NoiseResponse": metrics.NoiseResponse(num_levels=3)}


def scores(part: slice, group: dist.ProcessGroup | None) -> dict[str, object]:
    """What every twin computes after seeing `part` case by case."""
    found = states()
    for i in range(CASES)[part]:
        probability, target, uncertainty, error, other, distance = (t[i : i + 1] for t in batch())
        mask = target != -100
        for name, state in found.items():
            if name == "one pass":
                state.update(probability, target, uncertainty)
            elif isinstance(state, metrics.NoiseResponse):
                state.update([uncertainty, other, 2 * other], [0.1, 0.5, 0.3], distance=distance, mask=mask)
            elif isinstance(state, metrics.CaseMean):
                state.update(uncertainty, other, mask=mask)
            elif isinstance(state, PooledErrors):
                state.update(uncertainty, error, mask=mask)
            else:
                state.update(probability, target)
    return {name: state.compute(group, return_reason=True) for name, state in found.items()}


def flat(found: dict[str, object]) -> list[torch.Tensor]:
    return pytree.tree_leaves(found)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(flat(scores(slice(0, 1) if rank == 0 else slice(1, CASES), dist.group.WORLD)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    """One rank sees a single case in which nothing counts."""
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    expected = scores(slice(None), None)
    assert not any(bool(t.isnan().all()) for name, (t, _) in expected.items() if isinstance(t, torch.Tensor))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, flat(expected), equal_nan=True, rtol=1e-12, atol=1e-12)
