"""What a call costs the host where a GPU does the work: on small volumes it is all that a call costs.

On a pretended GPU: everything happens but the launches, of which a driver takes some 2 to 5 microseconds each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_CALLS, _ROUNDS = 200, 7
OPS = ("gradient_magnitude", "dirichlet_uncertainty", "evidential_loss", "supervised_evidential_loss")


def seconds() -> dict[str, dict[str, float]]:
    """Of each op on 1x4x16x16x16, in a process of its own: `forward`, `both` and how many `launches` these make."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "SURE_KERNELS_CHECKS": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from benchmarks import host; host.print_seconds()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def print_seconds() -> None:
    """`seconds` of this process, as JSON."""
    from sure_kernels.compile_check.pretended import PretendedGpu, pretended

    launched: list[str] = []
    with pretended(PretendedGpu(lambda name, *_: launched.append(name))):
        print(json.dumps({op: _seconds(op, launched) for op in OPS}))


def _seconds(op: str, launched: list[str]) -> dict[str, float]:
    from benchmarks.measure import once
    from benchmarks.registry import Setting, case_of

    case = case_of(op)
    setting = Setting("host", 1, 4, (16, 16, 16), torch.float32)
    args, kwargs = case.example(torch.Generator().manual_seed(0), setting)
    leaf = args[0].detach().requires_grad_()
    once(case.ours, args, kwargs, True)
    launched.clear()
    once(case.ours, args, kwargs, True)
    launches = len(launched)
    # In turns, so that what else the machine does meets both.
    rounds = [
        (
            _seconds_of(lambda: case.ours(leaf, *args[1:], **kwargs)),
            _seconds_of(lambda: once(case.ours, args, kwargs, True)),
        )
        for _ in range(_ROUNDS)
    ]
    forward, both = map(min, zip(*rounds, strict=True))
    return {"forward": forward, "both": both, "launches": launches}


def _seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of a call: the mean of many."""
    began = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - began) / _CALLS
