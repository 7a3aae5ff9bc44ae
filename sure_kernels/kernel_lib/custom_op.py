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
_OTHERS = {type(None), str, int, float, bool}


def _plain(arguments: Sequence[Any], recorded: bool) -> bool:
    """Whether no argument, nor one in a list, is a tensor of another class or, if `recorded`, requires a gradient."""
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            if recorded and x.requires_grad:
                return False
        elif kind not in _OTHERS and not (isinstance(x, (list, tuple)) and _plain(x, recorded)):
            return False
    return True


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function that changes none of its arguments as the custom op `name`.

    What it returns is called as the op is, positionally; `.op` is the registered one and `register_fake` its.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(name, function, mutates_args=())

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            seen = torch.compiler.is_compiling() or _modes() or torch.autograd._profiler_enabled()
            if seen or not _plain(args, torch.is_grad_enabled()):
                return op(*args)
            return function(*args)

        call.op, call.register_fake = op, op.register_fake  # type: ignore[attr-defined]
        return call

    return decorate
