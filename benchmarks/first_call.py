"""Seconds of the first loss and gradient of a process: with an empty cache of compiled kernels, then with a full one.

What every process of a user waits for once, and what it does not wait for again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

_OPS = ("evidential_loss", "supervised_evidential_loss")
_PROGRAM = """
import sys, time, torch, sure_kernels as sk
from sure_kernels.registry import OPS
spec = next(spec for spec in OPS if spec.name == sys.argv[1])
args, kwargs = spec.example(torch.Generator().manual_seed(0), 4, (64, 64, 64), torch.float32)
args[0].requires_grad_()
began = time.perf_counter()
getattr(sk, spec.name)(*args, **kwargs).backward()
print(time.perf_counter() - began)
"""


def seconds() -> dict[str, dict[str, float]]:
    """Of each loss on 1x4x64x64x64: `cold`, including every compilation, and `warm`, the fastest of three processes."""
    found = {}
    for op in _OPS:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "SURE_KERNELS_BACKEND": "compiled"}
            times = [_once(op, environment) for _ in range(4)]
        found[op] = {"cold": times[0], "warm": min(times[1:])}
    return found


def _once(op: str, environment: dict[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, op], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)
