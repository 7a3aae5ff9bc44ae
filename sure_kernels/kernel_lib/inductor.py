"""Formulas fused for the CPU by torch.compile (Inductor's C++): compiled once for every signature, with dynamic sizes.

A `Kernel` is a pure function of tensors and an example of its arguments. At its first call it is compiled on the
example, whose sizes along the marked axes stand for any other, so that the code never depends on what happened to come
first; from then on it runs. What was compiled is kept in Inductor's cache on disk: another process traces the function
again and finds the rest.

A kernel should be one loop: `grep "omp for"` in the .main.cpp that Inductor leaves in its cache. It splits where
two steps differ in shape (flatten everything) and where a sum reads a map that was stored. Comparisons of bytes are
several times slower than those of 32-bit numbers.

No compiler, one that fails, a cache that cannot be written: `CompilerError`, with the reason. `serve` falls back to the
eager form, with one warning, unless the compiled one was asked for. Nothing is probed or imported before a kernel is
wanted.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

# What the ops pass on for a backend: `compiled` was asked for by name, `auto` may fall back to the eager form.
COMPILED, AUTO = "compiled", "auto"
# Seconds after which a compilation explains itself: a warm cache answers sooner.
_PATIENCE = 4.0

_logger = logging.getLogger("sure_kernels")
_lock = threading.RLock()
T = TypeVar("T")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot serve this tensor; the message says why."""


class CompilerError(RuntimeError):
    """torch.compile cannot make a kernel here; the message says why."""


class _Retraced(Exception):
    """Something besides sizes changed since the kernel was compiled: number of threads, inference mode, ..."""


class _State:
    """What this process knows about its compiler."""

    works = False
    broken: str | None = None
    announced = False
    warned = False


class Kernel:
    """A function compiled at its first call.

    Args:
        name: what is said while it compiles.
        function: of tensors and sequences of tensors; writes its results to arguments or returns tensors.
        example: makes arguments. Every tensor comes with the axes whose size may differ (and is never 1) later on.
        options: of Inductor, beside those that all kernels share.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        example: Callable[[], Sequence[Any]],
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.function, self.example, self.options = name, function, example, options or {}
        self._run: Callable[..., Any] | None = None
        self._compiled = False
        self._compiling: int | None = None
        self._failure: str | None = None

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for _ in range(2):
                if not self._compiled:
                    self._compile()
                try:
                    return self._traced()(*args)
                except Exception as error:
                    if not type(error).__module__.startswith("torch._dynamo"):
                        raise
                    if not isinstance(_cause(error), _Retraced):
                        raise CompilerError(_summary(error)) from error
                    self._compiled = False
            raise CompilerError(f"torch.compile does not settle on one kernel for {self.name}")

    def _traced(self) -> Callable[..., Any]:
        """The function under torch.compile, which is imported only now: that alone fails where its cache cannot be."""
        if self._run is None:
            # Dynamo counts recompilations by code object, and closures share theirs.
            code, of = self.function.__code__.replace(), self.function
            own = types.FunctionType(code, of.__globals__, of.__name__, None, of.__closure__)
            self._run = torch.compile(own, backend=self._inductor, fullgraph=True, dynamic=False)
        return self._run

    def _inductor(self, graph: Any, inputs: Any) -> Any:
        """The backend of torch.compile: Inductor, on the example alone."""
        if self._compiling != threading.get_ident():
            raise _Retraced
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, inputs, config_patches=_known_options(self.options))
        self._compiled = True
        return compiled

    def _compile(self) -> None:
        with _lock:
            reason = _State.broken or self._failure
            if reason is not None:
                raise CompilerError(reason)
            self._compiling = threading.get_ident()
            try:
                with _announced(self.name):
                    self._traced()(*self.example())
                if not self._compiled:
                    raise CompilerError("torch.compile is off (TORCHDYNAMO_DISABLE, torch.compiler.set_stance)")
            except Exception as error:
                self._failure = _summary(error)
                if not _State.works:
                    _State.broken = self._failure
                raise CompilerError(self._failure) from error
            finally:
                self._compiling = None
            _State.works = True


def example(*shape: int, dtype: torch.dtype = torch.float32, dynamic: Sequence[int] = (0,)) -> Tensor:
    """A tensor of zeros for `Kernel.example`, with the axes `dynamic` marked."""
    from torch._dynamo import mark_dynamic

    x = torch.zeros(shape, dtype=dtype, device="cpu")
    for axis in dynamic:
        mark_dynamic(x, axis)
    return x


def why_not() -> str | None:
    """Why nothing can be compiled here; None where a small kernel can. The first time takes seconds."""
    try:
        _probe()(torch.zeros(2, device="cpu"))
    except CompilerError as error:
        return str(error)
    return None


@functools.cache
def _probe() -> Kernel:
    return Kernel("a first kernel", lambda x: x + 1, lambda: (example(64),))


def serve(backend: str, compiled: Callable[..., T], eager: Callable[..., T], *args: Any) -> T:
    """compiled(*args) where `backend` asks for it, else, and where `auto` finds that it cannot be, eager(*args)."""
    if backend in (COMPILED, AUTO):
        try:
            return compiled(*args)
        except CompilerError as error:
            if backend == COMPILED:
                raise BackendUnavailableError(f"backend 'compiled' cannot serve this tensor: {error}") from error
            if not _State.warned:
                _State.warned = True
                warnings.warn(
                    f"sure_kernels: large volumes on the CPU take the slower eager form, because {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return eager(*args)


@functools.cache
def _options() -> dict[str, Any]:
    options: dict[str, Any] = {
        # One kernel for any number of threads; a worker process with one thread must not start a team of several.
        "cpp.dynamic_threads": True,
        "cpp.enable_floating_point_contract_flag": "fast",
        # All of a sweep in one loop: what is used twice is kept in registers, and no sum reads a map that was stored.
        "max_fusion_size": 4096,
        "cpp.max_horizontal_fusion_size": 4096,
        "realize_opcount_threshold": 30,
        "realize_acc_reads_threshold": 12,
        "realize_reads_threshold": 4,
        # No pool of compiler processes, which a forked worker could not use.
        "compile_threads": 1,
        "size_asserts": False,
    }
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        # torch runs its own kernels of this kind here; Inductor would ask a child process again in every process.
        options["cpp.vec_isa_ok"] = True
    return options


def _known_options(more: dict[str, Any]) -> dict[str, Any]:
    """Options that this version of Inductor has, in the type it has them."""
    from torch._inductor import config

    known = config.get_config_copy()
    found = {}
    for name, value in {**_options(), **more}.items():
        if name in known:
            found[name] = bool(value) if isinstance(known[name], bool) else value
    return found


@contextmanager
def _announced(name: str) -> Iterator[None]:
    """Log a compilation; say what takes so long, once, where it does."""

    def explain() -> None:
        if not _State.announced:
            _State.announced = True
            _logger.warning(
                "sure_kernels: compiling kernels for the CPU (%s); up to half a minute each, once on this machine. "
                "SURE_KERNELS_BACKEND=eager does without.",
                name,
            )

    _logger.info("compiling %s", name)
    began = time.perf_counter()
    timer = threading.Timer(_PATIENCE, explain)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    _logger.info("compiled %s in %.1f s", name, time.perf_counter() - began)


def _cause(error: BaseException) -> BaseException:
    """What lies under the exceptions that torch.compile wraps around others."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return error if inner is None else _cause(inner)


def _summary(error: BaseException) -> str:
    """One line: the kind of error, its first line, and the compiler's first complaint."""
    cause = _cause(error)
    if isinstance(cause, CompilerError):
        return str(cause)
    if isinstance(cause, subprocess.CalledProcessError):
        output = cause.stderr or cause.output or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        said = next((line for line in text.splitlines() if line.strip()), "")
        return f"torch.compile failed ({cause.cmd[0]} ended with status {cause.returncode}: {said[:300]})"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    said = lines[:1]
    if "Output:" in lines[1:-1]:
        said.append(lines[lines.index("Output:") + 1])
    return f"torch.compile failed ({type(cause).__name__}: {'; '.join(said)[:300]})"
