"""How it is measured: time of forward and backward, bytes kept for backward, peak memory, copy bandwidth."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Bytes that are copied to find the bandwidth.
_COPIED = 1 << 28
# A measurement stops after so many repetitions, or seconds with at least three of them.
_REPEATS, _SECONDS = 20, 2.0


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _total(out: Any) -> Tensor:
    """A number of all outputs; a loss is one already, and a user's step calls its `backward`."""
    if isinstance(out, Tensor) and not out.ndim:
        return out
    parts = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]
    return sum((x.sum() for x in parts[1:]), parts[0].sum())


def _leaf(args: tuple[Tensor, ...], differentiable: bool) -> Tensor:
    leaf = args[0].detach()
    return leaf.requires_grad_() if differentiable else leaf


def times(
    function: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any], differentiable: bool
) -> dict[str, Any]:
    """Seconds of forward, backward and both: median, fastest, slowest, and how often it was repeated."""
    device = args[0].device
    leaf = _leaf(args, differentiable)
    found: dict[str, list[float]] = {"forward": [], "backward": [], "both": []}
    began = time.perf_counter()
    for repeat in range(-1, _REPEATS):
        leaf.grad = None
        synchronise(device)
        start = time.perf_counter()
        out = function(leaf, *args[1:], **kwargs)
        if differentiable:
            out = _total(out)
        synchronise(device)
        middle = time.perf_counter()
        if differentiable:
            out.backward()
            synchronise(device)
        end = time.perf_counter()
        del out
        if repeat < 0:  # compiling, and filling caches
            began = time.perf_counter()
            continue
        for name, seconds in (("forward", middle - start), ("backward", end - middle), ("both", end - start)):
            found[name].append(seconds)
        if repeat >= 2 and end - began > _SECONDS:
            break
    names = tuple(found) if differentiable else ("both",)
    return {
        name: {"median": statistics.median(found[name]), "fastest": min(found[name]), "slowest": max(found[name])}
        for name in names
    } | {"repeats": len(found["both"])}


def kept(function: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> dict[str, float]:
    """Bytes that autograd holds for backward, unique storages, in units of the first argument.

    `kept` are all, `added` those that are not the caller's own arguments, which are there anyway.
    """
    leaf = _leaf(args, True)
    given = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(leaf, *args[1:], **kwargs)
    del out
    unit = leaf.untyped_storage().nbytes()
    added = sum(size for pointer, size in seen.items() if pointer not in given)
    return {"kept": sum(seen.values()) / unit, "added": added / unit}


def once(function: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any], differentiable: bool) -> None:
    """Forward and, where there is one, backward."""
    out = function(_leaf(args, differentiable), *args[1:], **kwargs)
    if differentiable:
        _total(out).backward()


def peak(function: Callable[..., Any], args: tuple[Tensor, ...], kwargs: dict[str, Any], differentiable: bool) -> float:
    """Most bytes that torch's allocators held beyond the arguments, in units of the first argument."""
    leaf = args[0]
    gc.collect()

    def run() -> None:
        once(function, args, kwargs, differentiable)

    if leaf.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(leaf.device)
        before = torch.cuda.memory_allocated(leaf.device)
        run()
        most = torch.cuda.max_memory_allocated(leaf.device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        results = profile.profiler.kineto_results  # type: ignore[union-attr]
        most = held = 0
        for event in sorted(results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
    return most / leaf.untyped_storage().nbytes()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying what no cache holds."""
    source = torch.empty(_COPIED // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(6):
        synchronise(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * _COPIED / fastest
