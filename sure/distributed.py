"""The processes of one run, as torchrun starts them: who they are, and how they come to one answer."""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from sure.errors import SharedError, UserError
from sure.models import blocks

TIMEOUT = datetime.timedelta(hours=2)
"""Longest wait for the others: one process checks all data. A process that ends is noticed at once, not after this."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; `group` is None where it is alone."""

    rank: int = 0
    size: int = 1
    group: Any | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process. A UserError there is a SharedError in all of them."""
        if self.group is None:
            return work()
        answer: list[Any] = [None, None]
        cause = None
        if self.first:
            try:
                answer[0] = work()
            except UserError as error:
                cause, answer[1] = error, str(error)
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        if answer[1] is not None:
            raise SharedError(answer[1]) from cause
        return answer[0]

    def gather(self, mine: T) -> list[T]:
        """What every process holds, in order of rank, in all of them."""
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found


def rank_and_size() -> tuple[int, int]:
    """Of this process, from the environment that torchrun sets; (0, 1) without. UserError where it is half set."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"WORLD_SIZE: expected a number of processes, got {size!r}")
    if int(size) == 1:
        return 0, 1
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE: is {size}, but {', '.join(missing)} not set; torchrun starts several processes")
    return int(os.environ["RANK"]), int(size)


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes of this run, over NCCL where `device` is a GPU, over gloo elsewhere.

    A group that the caller has made is used and left as it is.
    """
    mine = not dist.is_initialized()
    rank, size = rank_and_size() if mine else (dist.get_rank(), dist.get_world_size())
    if size == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if mine:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank, size, dist.group.WORLD)
    except RuntimeError as error:
        # After an error the others may wait for this process: it ends, and does not wait for them.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without gloo's file and advice
        raise UserError(f"lost another process of the run, whose own message says why ({reason})") from error
    if mine:
        dist.destroy_process_group()


def local_rank() -> int:
    """Of this process on its machine: the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if rank_and_size()[1] > 1 else 0


def data_parallel(model: nn.Module) -> nn.Module:
    """DDP. Running statistics are each process's own: broadcast between the passes of a step, they would be written to
    while autograd holds them."""
    with warnings.catch_warnings():  # torch 2.13 renames the argument, which earlier ones know by this name alone
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def shard(model: nn.Module, group: Any) -> None:
    """FSDP2: each process keeps its share of every parameter of `model`, and gathers a block's when it computes it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type)
    for part in (*blocks(model), model):
        sharded = fully_shard(part, mesh=mesh)
        if mesh.device_type == "cpu":  # gloo of torch 2.8 sums where it is asked to average, and says nothing
            sharded.set_force_sum_reduction_for_comms(True)


def whole(tree: Any) -> Any:
    """A state dict with whole tensors in place of shares; all processes call it."""
    return pytree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def sharded_like(tree: Any, like: Any) -> Any:
    """Whole tensors as shares, where `like` (a tensor, or a state dict with the same keys) has them."""
    if isinstance(tree, dict):
        return {key: sharded_like(value, like.get(key)) for key, value in tree.items()}
    if isinstance(like, DTensor) and isinstance(tree, Tensor) and tree.shape == like.shape:
        return distribute_tensor(tree, like.device_mesh, like.placements)
    return tree


def local_part(x: Tensor) -> Tensor:
    """What of `x` this process has."""
    return x.to_local() if isinstance(x, DTensor) else x
