"""What the stateful metrics share: sums of fixed size, added up over batches and over the ranks of a process group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sure_kernels.metrics.undefined import Undefined, answer, scored
from sure_kernels.validation import check_process_group


class SumState(ABC):
    """Named float64 tensors of sums. Subclasses add to them in `update` and turn them into their result."""

    def __init__(self, **shapes: Sequence[int]) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.reset()

    def reset(self) -> None:
        """Forget everything seen; the next update decides the device."""
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self._shapes.items()}

    def compute(self, process_group: dist.ProcessGroup | None = None, *, return_reason: bool = False) -> Any:
        """The metric over all that was seen, on every rank of `process_group` where one is given.

        With `return_reason` also why it is NaN, as the function of the same name returns it.
        """
        sums = self.sums
        check_process_group(process_group)
        if process_group is not None:
            joined = torch.cat([t.flatten() for t in sums.values()])
            dist.all_reduce(joined, group=process_group)
            parts = joined.split([t.numel() for t in sums.values()])
            sums = {name: part.view(self._shapes[name]) for name, part in zip(sums, parts, strict=True)}
        result, reason = self._result(**sums)
        return answer((result, reason), return_reason)

    def _add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            if value.shape != self._shapes[name]:
                raise ValueError(f"expected sums of shape {self._shapes[name]}, got {tuple(value.shape)}")
            self.sums[name] = self.sums[name].to(value.device) + value.detach()

    @abstractmethod
    def _result(self, **sums: Tensor) -> tuple[Any, Any]:
        """The metric and its reason from the sums."""


class CaseMean(SumState):
    """The mean over cases of a metric that no sums over voxels give, such as exact rank statistics.

    `update` takes the arguments of `function`, which returns one number per case, and adds the numbers of the cases
    where it is defined; `compute` is their mean (0-d), NaN where there is none.
    """

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        """`options` are passed on to `function` at every update."""
        super().__init__(total=(), cases=())
        if not callable(function):
            raise TypeError(f"function: expected a callable, got {type(function).__name__}")
        self._function, self._options = function, options

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch; arguments and errors of the function."""
        per_case = self._function(*args, **self._options, **kwargs)
        if not isinstance(per_case, Tensor):
            exact = " (with method='exact' it is one)" if hasattr(per_case, "bound") else ""
            found = f"{type(per_case).__name__}{exact}"
            raise TypeError(f"function: expected one that returns a torch.Tensor, got {found}")
        defined = ~per_case.isnan()
        self._add(total=per_case.where(defined, 0).sum(), cases=defined.double().sum())

    def _result(self, **sums: Tensor) -> tuple[Tensor, Tensor]:
        return scored(sums["total"] / sums["cases"], (Undefined.NO_VOXEL, sums["cases"] == 0))
