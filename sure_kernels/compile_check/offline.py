"""Compile one kernel for one GPU, wherever this runs, and read registers, shared memory and spills from the result."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sure_kernels.compile_check.addressing import narrow_products
from sure_kernels.compile_check.cases import Arguments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a kernel.

    Attributes:
        registers: per thread (vector registers on AMD).
        shared: bytes of shared memory a block.
        spills: bytes a thread in local memory (vector registers spilled on AMD).
        error: why it does not compile, "" where it does.
        narrow: 32-bit products in addresses.
    """

    registers: int = 0
    shared: int = 0
    spills: int = 0
    error: str = ""
    narrow: tuple[str, ...] = ()

    def faults(self, spills_allowed: bool) -> list[str]:
        """What the check fails on, in words."""
        found = [f"does not compile: {self.error}"] if self.error else []
        if self.spills and not spills_allowed:
            found.append(f"spills {self.spills} to local memory")
        return found + [f"32-bit address: {line}" for line in self.narrow]


def compile_offline(kernel: Any, arguments: Arguments, target: str) -> Outcome:
    """Compile `kernel` for one of TARGETS."""
    signature = {
        name: "constexpr" if name in arguments.constants else arguments.types[name] for name in kernel.arg_names
    }
    aligned = {
        path: [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        for path, kind in _leaves((i,), signature[name])
        if kind.startswith("*")
    }
    try:
        source = ASTSource(kernel, signature, dict(arguments.constants), aligned)
        binary = triton.compile(source, target=TARGETS[target], options={"num_warps": arguments.num_warps})
    except Exception as error:  # whatever the compiler raises is the finding
        return Outcome(error=f"{type(error).__name__}: {str(error).strip() or repr(error)}")
    narrow = tuple(narrow_products(binary.asm["ttir"]))
    usage = _amd_usage(binary.asm["amdgcn"]) if "amdgcn" in binary.asm else _nvidia_usage(binary.asm["cubin"])
    # Some versions report shared memory in the binary, all of them in the metadata.
    return Outcome(usage[0], int(binary.metadata.shared), usage[1], "", narrow)


def _leaves(path: tuple[int, ...], kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """(path, type) of an argument, or of each entry of a tuple."""
    return [(path, kind)] if isinstance(kind, str) else [((*path, i), k) for i, k in enumerate(kind)]


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [os.fspath(tool), "--dump-resource-usage", os.fspath(path)], check=True, capture_output=True, text=True
        ).stdout
    return _number(r"\bREG:(\d+)", text), _number(r"\bSTACK:(\d+)", text) + _number(r"\bLOCAL:(\d+)", text)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, vector registers spilled) of an AMD assembly listing."""
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's report; does this version of triton print it otherwise?")
    return int(found.group(1))
