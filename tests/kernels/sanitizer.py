"""Memory and race checks of kernels in Triton's interpreter, which itself reads and writes whatever an address says.

Every address that a kernel loads or stores must lie within one of the tensors it was given: within the view, not merely
within the allocation. And since the interpreter runs programs one after the other, in an order that no GPU keeps, no
program may touch what another one writes in the same launch, nor read again what it has written itself, for which its
threads would have to wait for each other. Of a number and NaN the larger or smaller is the number, as on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

# Of larger extents (views that only stride far) the order of accesses is not followed: a number a byte would be held.
_FOLLOWED = 1 << 22
_NOBODY, _SEVERAL = -1, -2


class _Extent:
    """The bytes that one tensor, or several that overlap, reach over, and who has touched them in this launch."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        # Reads before the first write: most tensors see none.
        self._earlier: list[tuple[np.ndarray, int]] = []
        self._owners: tuple[np.ndarray, np.ndarray] | None = None

    def read(self, addresses: np.ndarray, program: int) -> str | None:
        if self._owners is None:
            self._earlier.append((addresses, program))
            return None
        writer, reader = self._owners
        at = addresses - self.start
        if (writer[at] != _NOBODY).any():
            return "reads what this launch has written"
        before = reader[at]
        reader[at] = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)
        return None

    def write(self, addresses: np.ndarray, program: int) -> str | None:
        if self.end - self.start > _FOLLOWED:
            return None
        if self._owners is None:
            nobody = np.full(self.end - self.start, _NOBODY, np.int32)
            self._owners = nobody, nobody.copy()
            for earlier in self._earlier:
                self.read(*earlier)
        writer, reader = self._owners
        at = addresses - self.start
        if (writer[at] != _NOBODY).any() or len(np.unique(at)) < len(at):
            return "writes where this launch has written"
        if not np.isin(reader[at], (_NOBODY, program)).all():
            return "writes what another program of the launch reads"
        writer[at] = program
        return None


class _Launch:
    """The tensors of the launch that is under way."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.kernel = kernel
        self.extents: list[_Extent] = []
        reach = sorted(
            (x.data_ptr(), x.data_ptr() + x.element_size() * (1 + _span(x))) for x in tensors if x.numel() > 0
        )
        for start, end in reach:
            if self.extents and start < self.extents[-1].end:
                self.extents[-1].end = max(self.extents[-1].end, end)
            else:
                self.extents.append(_Extent(start, end))

    def check(self, kind: str, addresses: np.ndarray, size: int, program: int) -> None:
        left = addresses.size
        for extent in self.extents if left else ():
            inside = (addresses >= extent.start) & (addresses + size <= extent.end)
            count = int(np.count_nonzero(inside))
            if count == 0:
                continue
            touch = extent.read if kind == "load" else extent.write
            fault = touch(addresses if count == addresses.size else addresses[inside], program)
            assert fault is None, f"{self.kernel}, program {program}, {fault}"
            left -= count
            if left == 0:
                return
        assert left == 0, f"{self.kernel}, program {program}, {kind}s {left} elements outside its tensors"


def _span(x: torch.Tensor) -> int:
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, tuple):
            found += _tensors(value)
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


def install() -> None:
    """Check every launch of this process from now on."""
    launches: list[_Launch] = []

    def watched(kind: str, access: Any) -> Any:
        @functools.wraps(access)
        def checked(builder: Any, ptrs: Any, *args: Any) -> Any:
            mask = args[0] if kind == "load" else args[1]
            x, y, z = builder.grid_idx
            program = (z * builder.grid_dim[1] + y) * builder.grid_dim[0] + x
            addresses = np.asarray(ptrs.data).astype(np.int64)[
                np.broadcast_to(mask.data, np.shape(ptrs.data)).astype(bool)
            ]
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            launches[-1].check(kind, addresses, max(size, 1), program)
            return access(builder, ptrs, *args)

        return checked

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    builder.create_masked_load = watched("load", builder.create_masked_load)
    builder.create_masked_store = watched("store", builder.create_masked_store)
    # As a GPU has them: NaN is dropped unless asked for. The interpreter's own keep it.
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)

    prepare, call = executor._init_args_hst, executor.__call__

    @functools.wraps(prepare)
    def prepared(self: Any, args: Any, kwargs: Any) -> Any:
        hosts, named = prepare(self, args, kwargs)
        launches.append(_Launch(self.fn.__name__, _tensors([*hosts, *named.values()])))
        return hosts, named

    @functools.wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(launches)
        try:
            return call(self, *args, **kwargs)
        finally:
            del launches[before:]

    executor._init_args_hst, executor.__call__ = prepared, called
