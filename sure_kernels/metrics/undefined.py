"""Why a metric is NaN.

Every function takes `return_reason=True` and then returns (result, reason): `reason` has the shape of the result, int8,
and holds `Undefined` codes, 0 where the result is defined. `Undefined(code).text` says it in words. Where a result has
several tensors, so has the reason.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sure_kernels.validation import check_bool


class Undefined(enum.IntEnum):
    """Reasons for NaN, the first that applies."""

    DEFINED = 0
    NAN_INPUT = 1
    NO_VOXEL = 2
    NO_ERROR = 3
    ALL_ERRORS = 4
    CLASS_ABSENT = 5
    FEW_POINTS = 6
    CONSTANT = 7
    NO_PAIR = 8
    FEW_LEVELS = 9

    @property
    def text(self) -> str:
        """The reason in words."""
        return _TEXTS[self]


_TEXTS = {
    Undefined.DEFINED: "defined",
    Undefined.NAN_INPUT: "a counted value is NaN",
    Undefined.NO_VOXEL: "nothing counts",
    Undefined.NO_ERROR: "nothing that counts is wrong",
    Undefined.ALL_ERRORS: "all that counts is wrong",
    Undefined.CLASS_ABSENT: "the class does not occur where voxels count",
    Undefined.FEW_POINTS: "fewer than two points count",
    Undefined.CONSTANT: "one of the quantities is constant",
    Undefined.NO_PAIR: "every pair is tied",
    Undefined.FEW_LEVELS: "fewer than three levels",
}


class Scored(NamedTuple):
    """A metric and, of the same shape, why it is NaN."""

    value: Tensor
    reason: Tensor


def scored(value: Tensor, *reasons: tuple[Undefined, Tensor]) -> Scored:
    """`value` with NaN where one of the conditions holds, which must cover all of its own NaN."""
    reason = torch.zeros(value.shape, dtype=torch.int8, device=value.device)
    for code, holds in reversed(reasons):
        reason = torch.where(holds, int(code), reason)
    return Scored(torch.where(reason == 0, value, torch.nan), reason)


def answer(scored: Iterable[Any], return_reason: bool) -> Any:
    """What a public function returns: (result, reason), or the result alone."""
    check_bool(return_reason, "return_reason")
    result, reason = scored
    return (result, reason) if return_reason else result
