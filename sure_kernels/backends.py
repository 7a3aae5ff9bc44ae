"""Which implementation serves a tensor, and why the others do not.

`auto` (the default) takes the fastest backend that works for the tensor; a backend named explicitly, by
`set_backend`, the `backend` context manager or SURE_KERNELS_BACKEND, is used or refused with the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from sure_kernels.validation import check_choice

BACKENDS = ("auto", "triton", "compiled", "eager", "reference")
IMPLEMENTED = ("eager", "reference")

_chosen: str | None = None


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot serve this tensor; the message says why."""


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


def why_not(name: str, tensor: Tensor | None = None) -> str | None:
    """Why backend `name` cannot serve `tensor` (or, without one, any tensor here); None where it can."""
    if name not in IMPLEMENTED:
        return f"this version of sure_kernels has no {name} kernels"
    return None


def backends() -> dict[str, str | None]:
    """Every backend but `auto`, with None where it works here and the reason where it does not."""
    return {name: why_not(name) for name in BACKENDS if name != "auto"}


def get_backend(tensor: Tensor) -> str:
    """The backend that serves `tensor`: never `auto`.

    Raises BackendUnavailableError (a RuntimeError) when one was asked for that cannot.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    name = requested()
    if name == "auto":
        return "eager"
    reason = why_not(name, tensor)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot serve this tensor: {reason}")
    return name
