"""Compile one kernel for one GPU, wherever this runs, and read registers, shared memory and spills from the result."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sure_kernels.compile_check import addressing
from sure_kernels.compile_check.cases import Arguments
from sure_kernels.kernel_lib.launch import register_limits, warps_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# What an outcome depends on besides: how it is read.
_CHECK = b"".join(Path(str(path)).read_bytes() for path in (__file__, addressing.__file__))


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a kernel.

    Attributes:
        registers: per thread (vector registers on AMD).
        shared: bytes of shared memory a block.
        spills: bytes a thread in local memory (vector registers spilled on AMD).
        error: why it does not compile, "" where it does.
        narrow: 32-bit products in addresses and masks.
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


class Compilation(NamedTuple):
    """One kernel as the launcher hands it to the compiler."""

    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    # What is known of arguments, by their place (and that in a tuple).
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    target: str

    def key(self) -> str:
        """Differs where the outcome might: the sources of kernel and check, arguments, target, compiler."""
        parts = (self.kernel.cache_key, *self[1:], triton.__version__, _CHECK)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def compile(self) -> Outcome:
        """What a `Launch` would take: with a limit on registers where it spills without."""
        outcome = self._compile({})
        limits = register_limits(outcome.registers) if TARGETS[self.target].backend == "cuda" else ()
        for limit in limits:
            if not outcome.spills:
                break
            outcome = min(outcome, self._compile({"maxnreg": limit}), key=lambda found: found.spills)
        return outcome

    def _compile(self, more: dict[str, int]) -> Outcome:
        """Compile, in a cache of its own: as if for the first time, and nothing is left behind."""
        with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            try:
                source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
                options = {"num_warps": self.num_warps, **more}
                binary = triton.compile(source, target=TARGETS[self.target], options=options)
            except Exception as error:  # whatever the compiler raises is the finding
                return Outcome(error=f"{type(error).__name__}: {str(error).strip() or repr(error)}")
        narrow = tuple(addressing.narrow_products(binary.asm["ttir"]))
        usage = _amd_usage(binary.asm["amdgcn"]) if "amdgcn" in binary.asm else nvidia_usage(binary.asm["cubin"])
        # Some versions report shared memory in the binary, all of them in the metadata.
        return Outcome(usage[0], int(binary.metadata.shared), usage[1], "", narrow)


def compilation(
    kernel: Any, arguments: Arguments, target: str, integers: str = "i32", pointers: str = "aligned"
) -> Compilation:
    """`kernel` for one of TARGETS, its run-time integers and pointers as INTEGERS and POINTERS have it."""
    constants, signature, attributes = dict(arguments.constants), {}, {}
    for i, parameter in enumerate(kernel.params):
        name, specialised = parameter.name, not parameter.do_not_specialize
        kind = "constexpr" if name in constants else arguments.types[name]
        integer = kind in ("int", "i32")
        if integer and specialised and integers == "1":
            kind, constants[name] = "constexpr", 1
        elif kind == "int":
            kind = "i64" if integers.endswith("i64") else "i32"
        signature[name] = kind
        for path, leaf in _leaves((i,), kind):
            known: list[list[Any]] = []
            if leaf.startswith("*") and pointers.startswith("aligned"):
                known.append(["tt.divisibility", 16])
            if leaf.startswith("*") and pointers.endswith("small"):
                known.append(["tt.pointer_range", 32])
            if integer and specialised and integers.startswith("16"):
                known.append(["tt.divisibility", 16])
            if known:
                attributes[path] = known
    num_warps = warps_of(arguments.num_warps, TARGETS[target].warp_size)
    return Compilation(kernel, signature, constants, attributes, num_warps, target)


def _leaves(path: tuple[int, ...], kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """(path, type) of an argument, or of each entry of a tuple."""
    return [(path, kind)] if isinstance(kind, str) else [((*path, i), k) for i, k in enumerate(kind)]


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
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
