"""Custom ops that torch's dispatcher is asked for only where something else than the op itself looks on.

Going through it costs a custom op written in Python 15 to 20 microseconds a call, several times what its launches do.
It is needed where an op is traced or intercepted; inside an autograd Function, on plain tensors, it would call the
same function in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# How many modes (fake tensors, tracing, counters, ...) see every op; profilers do as well. Not part of torch's public
# interface: where it is missing, the dispatcher is always asked.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_LISTS = {list, tuple}
_PLAIN = {Tensor, torch.nn.Parameter, type(None), str, int, float, bool} | _LISTS


def _plain(arguments: Sequence[Any], recorded: bool, of_tensors: bool) -> bool:
    """Whether no argument is a tensor of another class or, if `recorded`, requires a gradient.

    `of_tensors`: nor is any in a list; lists of numbers alone need not be looked into.
    """
    if not _PLAIN.issuperset(map(type, arguments)):
        return False
    if recorded and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return False
    return not of_tensors or all(_plain(x, recorded, False) for x in arguments if type(x) in _LISTS)


def custom_op(name: str, *, recorded: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function that changes none of its arguments as the custom op `name`.

    `recorded`: whether Inductor may take it into CUDA graphs. Not where the host waits, nor where tensors are kept from
    call to call: made while a graph warms up, they would lie in memory that belongs to the graph.

    What it returns is called as the op is, positionally; `.op` is the registered one and `register_fake` its.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(
            name, function, mutates_args=(), tags=() if recorded else torch.Tag.cudagraph_unsafe
        )
        of_tensors = "Tensor[]" in torch.library.infer_schema(function, mutates_args=())

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            seen = torch.compiler.is_compiling() or _modes() or torch.autograd._profiler_enabled()
            if seen or not _plain(args, torch.is_grad_enabled(), of_tensors):
                return op(*args)
            return function(*args)

        call.op, call.register_fake = op, op.register_fake  # type: ignore[attr-defined]
        return call

    return decorate
