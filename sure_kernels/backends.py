"""Which implementation serves a tensor, and why the others do not.

`auto` (the default) takes the fastest backend that works for the tensor; a backend named explicitly, by
`set_backend`, the `backend` context manager or SURE_KERNELS_BACKEND, is used or refused with the reason.

`triton` serves CUDA and ROCm tensors. On the CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1), which is
for tests: `auto` never takes it there.

`compiled` serves CPU tensors where torch.compile finds a working C++ compiler. `auto` takes it from a size on at which
compiling pays; it is a matter of size alone, never of what ran before, so that a resumed run computes what an
uninterrupted one does. Whether the compiler works shows when the first kernel is wanted: ops are told `auto`.

Nothing is probed when this module is imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from sure_kernels.kernel_lib import inductor
from sure_kernels.kernel_lib.inductor import AUTO, COMPILED, BackendUnavailableError
from sure_kernels.validation import check_choice

__all__ = ["BACKENDS", "BackendUnavailableError", "backend", "backends", "get_backend", "set_backend", "why_not"]

BACKENDS = ("auto", "triton", "compiled", "eager", "reference")
TRITON_OPS = (
    "gradient_magnitude",
    "dirichlet_uncertainty",
    "evidential_loss",
    "supervised_evidential_loss",
    "pairwise_ranking_loss",
    "segmentation_histograms",
    "noise_uncertainty_loss",
    "boundary_distance",
    "boundary_band",
)
COMPILED_OPS = (
    "gradient_magnitude",
    "dirichlet_uncertainty",
    "evidential_loss",
    "supervised_evidential_loss",
    "segmentation_histograms",
)
# Numbers in the tensor from which on `auto` compiles. A step on 2^20 of them is some 20 ms faster than the eager form
# on two cores, and compiling loss and gradient takes some 20 s: it pays within a thousand steps, a short training.
_WORTH_COMPILING = 1 << 20
# An evaluation scores a hundred volumes, not thousands.
_WORTH_COMPILING_ONCE = 1 << 22
# Compiled kernels are written out class by class; more would take minutes to compile.
_MOST_CLASSES = 32
# Ops whose kernels have the images on the second axis of their grid, and what CUDA takes there.
_IMAGES_ON_AN_AXIS = (
    "dirichlet_uncertainty",
    "evidential_loss",
    "supervised_evidential_loss",
    "noise_uncertainty_loss",
)
_MOST_IMAGES = 65535
# Triton compiles for NVIDIA GPUs from this compute capability on.
_OLDEST_CAPABILITY = (7, 0)

_chosen: str | None = None


def set_backend(name: str) -> None:
    """Use backend `name` from here on (`auto`, `triton`, `compiled`, `eager`, `reference`).

    Raises ValueError for an unknown name. Whether it can serve a tensor is decided, and an error raised,
    when it meets one.
    """
    global _chosen
    _chosen = check_choice(name, "backend", BACKENDS)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use backend `name` within a `with` block."""
    global _chosen
    previous = _chosen
    set_backend(name)
    try:
        yield
    finally:
        _chosen = previous


def requested() -> str:
    """The backend asked for: the last `set_backend`, else SURE_KERNELS_BACKEND, else `auto`."""
    if _chosen is not None:
        return _chosen
    return check_choice(os.environ.get("SURE_KERNELS_BACKEND", "auto"), "SURE_KERNELS_BACKEND", BACKENDS)


@functools.cache
def _why_not_triton() -> str | None:
    """Why triton cannot be used at all; None where it imports."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return (
            f"triton cannot be imported ({type(error).__name__}: {error}); install it with: pip install 'triton>=3.4'"
        )
    return None


@functools.cache
def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when triton is imported, and asked only once it is."""
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    if knobs is not None:
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _why_not_device(index: int) -> str | None:
    """Why Triton cannot compile for this GPU."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CAPABILITY:
        return "Triton needs compute capability {}.{}, this GPU has {}.{}".format(*_OLDEST_CAPABILITY, *capability)
    return None


def _why_no_triton_for(device: str, index: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve a tensor; under torch.compile it is asked for while tracing."""
    reason = _why_not_triton()
    if reason is not None:
        return reason
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, the tensor is float64"
    if device == "cuda":
        return _why_not_device(index)
    if device != "cpu":
        return f"the Triton kernels run on CUDA and ROCm devices, the tensor is on {device}"
    if not _interpreted():
        return "the tensor is on the CPU, where Triton runs only in its interpreter (set TRITON_INTERPRET=1 first)"
    return None


# What torch.compiler.assume_constant_result does; that would import torch._dynamo, which takes a second.
_why_no_triton_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_no_triton_here() -> str | None:
    """Why Triton can serve no tensor at all."""
    reason = _why_not_triton()
    if reason is None and not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA or ROCm device; on the CPU set TRITON_INTERPRET=1 before Python starts, for tests"
    return reason


def _why_not_compiled(tensor: Tensor | None, op: str | None) -> str | None:
    """Why compiled kernels cannot serve a tensor, as far as that shows without the compiler."""
    if op is not None and op not in COMPILED_OPS:
        return f"{op} has no compiled kernels"
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        return f"compiled kernels run on the CPU, the tensor is on {tensor.device}"
    if tensor.dtype == torch.float64:
        return "compiled kernels compute in float32, the tensor is float64"
    if tensor.ndim > 1 and tensor.shape[1] > _MOST_CLASSES:
        return f"compiled kernels serve up to {_MOST_CLASSES} channels, the tensor has {tensor.shape[1]}"
    return None


def why_not(name: str, tensor: Tensor | None = None, op: str | None = None) -> str | None:
    """Why backend `name` cannot serve `tensor` in `op` (or, without them, anything here); None where it can.

    For `compiled` a small kernel is compiled once a process, unless torch.compile is tracing.
    """
    if name == COMPILED:
        reason = _why_not_compiled(tensor, op)
        if reason is None and not torch.compiler.is_compiling():
            reason = inductor.why_not()
        return reason
    if name != "triton":
        return None
    if op is not None and op not in TRITON_OPS:
        return f"{op} has no Triton kernels"
    if tensor is None:
        return _why_no_triton_here()
    if op in _IMAGES_ON_AN_AXIS and len(tensor) > _MOST_IMAGES:
        return f"the Triton kernels of {op} serve up to {_MOST_IMAGES} images, the tensor has {len(tensor)}"
    index = tensor.device.index
    return _why_no_triton_for(tensor.device.type, 0 if index is None else index, tensor.dtype)


def backends() -> dict[str, str | None]:
    """Every backend but `auto`, with None where it works here and the reason where it does not."""
    return {name: why_not(name) for name in BACKENDS if name != AUTO}


def get_backend(tensor: Tensor, op: str | None = None) -> str:
    """The backend that serves `tensor`, in the public function `op` where it matters: never `auto`.

    Raises BackendUnavailableError (a RuntimeError) when one was asked for that cannot.
    """
    name = dispatch(tensor, op)
    if name in (AUTO, COMPILED):
        reason = why_not(COMPILED, tensor, op)
        if reason is not None and name == COMPILED:
            raise _unavailable(name, reason)
        return COMPILED if reason is None else "eager"
    return name


def dispatch(tensor: Tensor, op: str | None = None) -> str:
    """What the ops are told: as `get_backend`, without trying the compiler. `auto`: compiled kernels, or else eager."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    name = requested()
    if name == AUTO:
        if tensor.device.type == "cuda" and why_not("triton", tensor, op) is None:
            return "triton"
        least = _WORTH_COMPILING_ONCE if op == "segmentation_histograms" else _WORTH_COMPILING
        return AUTO if tensor.numel() >= least and _why_not_compiled(tensor, op) is None else "eager"
    reason = _why_not_compiled(tensor, op) if name == COMPILED else why_not(name, tensor, op)
    if reason is not None:
        raise _unavailable(name, reason)
    return name


def _unavailable(name: str, reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"backend {name!r} cannot serve this tensor: {reason}")
