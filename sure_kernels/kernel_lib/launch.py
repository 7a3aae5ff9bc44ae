"""What the launchers share: launches, volumes and strides as kernels read them, block sizes, scales of the filters.

Block sizes come from tables, never from a tuner: they depend on the shape alone, so that the same input gives the
same bits everywhere.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from operator import attrgetter, or_
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

from sure_kernels.kernel_lib.taps import SMOOTHING

# Planes that a program of a marching kernel handles: each start costs two planes more.
_LONG_MARCH, _SHORT_MARCH = 32, 8
# From this many voxels on there are programs enough to march far.
_LARGE_VOLUME = 1 << 22


# Launches kept of each kind; a training that sees more shapes makes some of them again.
_KEPT = 256
_plans: list[Any] = []
_ALIGNMENT = 16
_KNOWN_TRITON = ("3.4", "3.5", "3.6", "3.7")
_dtype_of = attrgetter("dtype")
_P = ParamSpec("_P")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def register_limits(registers: int) -> tuple[int, ...]:
    """Limits on registers a thread to compile a kernel with that spills at so many without one.

    NVIDIA's assembler settles for fewer registers than there are, so that more programs run at a time, and may miss
    that aim by a few bytes that it spills. Told of the limit it meets it, or the next: they are handed out by eights.
    """
    step = -(-registers // 8) * 8
    return tuple(limit for limit in (step, step + 8) if limit < 255)


def _spills(compiled: Any, grid: tuple[int, ...]) -> int:
    """Words that a compiled kernel spills, which it knows once it is loaded: when it is made ready for a grid."""
    compiled[grid]
    return compiled.n_spills


def _finished(compiled: Any) -> Any:
    """The compiled kernel; under Triton's AsyncCompileMode it is a promise of one."""
    return compiled.result() if hasattr(compiled, "result") else compiled


def _hooked(hook: Any) -> bool:
    """Whether somebody, a profiler say, wants to know of launches: a hook, from Triton 3.5 on a chain of them."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _ready(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`compiled[grid]`, without what that does for hooks at every launch where there are none.

    How it launches is not part of Triton's public interface: versions not known here do it themselves.
    """
    triton = importlib.import_module("triton")
    whole = compiled[grid]
    if triton.__version__.rpartition(".")[0] not in _KNOWN_TRITON:
        return whole
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    runtime, driver = triton.knobs.runtime, triton.runtime.driver.active
    device, stream_of = driver.get_current_device(), driver.get_current_stream

    def launch(*arguments: Any) -> None:
        if _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
            whole(*arguments)
        else:
            run(*grid, stream_of(device), function, packed, None, None, None, *arguments)

    return launch


class Launch:
    """Launches a kernel again and again, with everything fixed but the tensors and, where they change, floats.

    What Triton does at every launch, looking for the compiled kernel that fits the arguments, takes longer than the
    launch itself. It depends on types, on which integers are 1 or divided by 16, and on which pointers are; only
    the pointers can differ here.

    Args:
        kernel: a `triton.jit` function whose arguments are tensors, then numbers, then compile-time constants.
        grid: of one to three axes.
        numbers: the run-time numbers.
        options: the constants by name, and `num_warps`.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self._found: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._constants: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor, numbers: tuple[float, ...] | None = None) -> None:
        """Launch on the current device and stream; `numbers` differ from the usual ones in floats alone."""
        numbers = self.numbers if numbers is None else numbers
        key: tuple[Any, ...] = tuple(map(_dtype_of, tensors))
        addresses = list(map(Tensor.data_ptr, tensors))
        if functools.reduce(or_, addresses) % _ALIGNMENT:
            key += tuple([address % _ALIGNMENT == 0 for address in addresses])
        found = self._found.get(key)
        if found is not None:
            # Of tensors Triton asks the driver, one by one, whether they are the GPU's: here it is known.
            found(*addresses, *numbers, *self._constants)
            return
        compiled = _finished(self.kernel[self.grid](*tensors, *numbers, **self.options))
        # Nothing in the interpreter. For AMD's GPUs Triton looks at the tensors' sizes as well.
        if compiled is None or torch.version.hip is not None:
            return
        grid = (*self.grid, 1, 1)[:3]
        for limit in register_limits(compiled.n_regs):
            if not compiled.n_spills:
                break
            # Compiled and loaded, not launched again: a kernel may work in place.
            other = _finished(self.kernel.warmup(*tensors, *numbers, grid=self.grid, **self.options, maxnreg=limit))
            if other is not None:
                compiled = min(compiled, other, key=lambda found: _spills(found, grid))
        self._constants = tuple(self.options[name] for name in self.kernel.arg_names if name in self.options)
        self._found[key] = _ready(compiled, grid)


def planned(plan: Callable[_P, Launch]) -> Callable[_P, Launch]:
    """Decorator of functions that plan a launch from hashable arguments: done once for equal ones.

    The device is to be one of them: what is launched again has been loaded on one GPU.
    """
    kept = functools.lru_cache(maxsize=_KEPT)(plan)
    _plans.append(kept)
    return cast("Callable[_P, Launch]", kept)


def forget_plans() -> None:
    """Plan every launch anew: for tests that change what plans are made of."""
    for kept in _plans:
        kept.cache_clear()


def warps_of(number: int, lanes: int) -> int:
    """Warps of `lanes` lanes with as many threads as `number` warps of 32, for which blocks are sized; at least one."""
    return max(1, number * 32 // lanes)


@functools.cache
def warps_on(number: int, device: torch.device) -> int:
    """`warps_of` on a device: AMD's data-centre GPUs have 64 lanes a warp. 32 lanes in the interpreter."""
    lanes = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return warps_of(number, lanes)


def as_volume(x: Tensor) -> Tensor:
    """(N, C, *spatial) as a view (N, C, D, H, W), with D = 1 for two spatial axes."""
    return x.unsqueeze(2) if x.ndim == 4 else x


def march_length(voxels: int, depth: int) -> int:
    """Planes that one program of a marching kernel handles."""
    return min(depth, _LONG_MARCH if voxels >= _LARGE_VOLUME else _SHORT_MARCH)


def march_grid(volumes: int, sizes: Sequence[int], steps: int, block: int) -> tuple[int]:
    """Programs that march `steps` planes of (D, H, W) volumes, `block` voxels of a plane each."""
    d, h, w = sizes
    return (volumes * cdiv(d, steps) * cdiv(h * w, block),)


def centre_tap(operator: str) -> float:
    """The centre tap in units of the side tap; 0 where nothing is smoothed."""
    side, centre = SMOOTHING[operator]
    return centre / side if side > 0 else 0.0


def axis_scales(operator: str, spacing: tuple[float, ...]) -> tuple[float, float, float]:
    """Factors (d, h, w) that turn the unnormalised filters of `device_taps` into derivatives per unit spacing.

    Two spatial axes are h and w; the factor of d is then 0.
    """
    side, _ = SMOOTHING[operator]
    smoothed = side ** (len(spacing) - 1) if side > 0 else 1.0
    scales = [0.5 * smoothed / step for step in spacing]
    d, h, w = [0.0] * (3 - len(scales)) + scales
    return d, h, w


def gradient_format(logits: Tensor) -> torch.memory_format:
    """Memory format of a gradient: channels-last where `logits` are, contiguous otherwise."""
    channels_last = torch.channels_last if logits.ndim == 4 else torch.channels_last_3d
    if logits.is_contiguous(memory_format=channels_last) and not logits.is_contiguous():
        return channels_last
    return torch.contiguous_format
