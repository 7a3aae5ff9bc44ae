"""The one state that the stateful metrics share: sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SumState(ABC):
    """A float64 tensor of sums. Subclasses add to it in `update` and turn it into their result."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self.reset()

    def reset(self) -> None:
        """Forget everything seen; the next update decides the device."""
        self.sums = torch.zeros(self._shape, dtype=torch.float64)

    def compute(self, process_group: dist.ProcessGroup | None = None) -> Any:
        """The metric over all voxels seen, on every rank of `process_group` where one is given."""
        sums = self.sums
        if process_group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=process_group)
        return self._result(sums)

    def _add(self, sums: Tensor) -> None:
        self.sums = self.sums.to(sums.device) + sums.detach()

    @abstractmethod
    def _result(self, sums: Tensor) -> Any:
        """The metric from its sums."""
