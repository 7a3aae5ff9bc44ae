"""A GPU that is not there: kernels are compiled for it, and launching them is noted instead of done.

For what a launch hands to a kernel and what it costs the host, on machines without a GPU. CPU tensors stand for those
on the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sure_kernels.compile_check.offline import TARGETS, nvidia_usage


class PretendedGpu:
    """What compiling and launching ask a Triton driver for.

    Args:
        note: called in place of a launch with a kernel's name, its grid, its arguments and their types in Triton's
            words; those of pointers are tensors or addresses.
    """

    def __init__(self, note: Callable[[str, tuple[int, ...], tuple[Any, ...], list[Any]], None]) -> None:
        self.note = note
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name, types = metadata.name, list(source.signature.values())
        # Grid, stream, function, metadata and hooks come before the kernel's own arguments.
        return lambda *args: self.note(name, args[:3], args[9:], types)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, words spilled and most threads."""
        registers, spilled = nvidia_usage(binary)
        return 1, 1, registers, spilled // 4, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS["sm_90"]


def _yes() -> bool:
    return True


@contextmanager
def pretended(gpu: PretendedGpu) -> Iterator[None]:
    """Within the block CPU tensors are served by the Triton kernels, on `gpu`.

    Triton keeps what it compiled and by whom it is launched: one GPU for all blocks of a process that has no real one.
    """
    backends = importlib.import_module("sure_kernels.backends")
    # Newer versions of Triton make `active` a property.
    active = "_active" if hasattr(driver, "_active") else "active"
    with (
        mock.patch.object(driver, active, gpu),
        mock.patch.object(backends, "_interpreted", _yes),
        backends.backend("triton"),
    ):
        yield
