"""Sums over the ranks of a process group.

Convention of every loss here: values are those of the joined batch on every rank, and the local gradient is
world_size times the local share of the global one, so that DistributedDataParallel's averaging yields the
gradient of one process on the joined batch.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def world_size(group: Any | None) -> int:
    """Ranks in `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def all_reduced(x: Tensor, group: Any | None) -> Tensor:
    """The sum of `x` over the ranks, without gradient."""
    if group is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


def global_sum(x: Tensor, group: Any | None) -> Tensor:
    """The sum of `x` over the ranks, with the gradient convention above."""
    if group is None:
        return x
    share = x * world_size(group)
    return all_reduced(x, group) + (share - share.detach())
