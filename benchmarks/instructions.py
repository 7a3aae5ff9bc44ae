"""Machine instructions a voxel of the kernels that are bound by their issue: counted offline, without a GPU.

Of the fused sweeps' main loop, which goes through the planes of a march or the blocks of a program, and of the whole
kernels for Dirichlet measures, which have no loop; as compiled for an H100 or H200.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# An address, the instruction at it, and where a branch leads.
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_FLAGS = {
    "kind": "digamma",
    "evidence": "softplus",
    "prior": "unit",
    "mask": False,
    "dtype": "bfloat16",
    "image": "float32",
    "labels": "u8",
    "contiguous": True,
    "weighted": False,
    "operator": "sobel",
    "padding": "replicate",
    "reduction": "l2",
}
GRADIENTS = {
    "none": "without supervision",
    "cached": "magnitude read",
    "marched": "filtered on the march",
}
# Measures of `dirichlet_uncertainty` in the table.
MEASURED = (("probability", "vacuity"), ("vacuity", "entropy", "mutual_information"))


class Count(NamedTuple):
    """Instructions a voxel, and registers a thread."""

    instructions: float
    registers: int


def loop_length(sass: str) -> int:
    """Instructions of the longest loop in a listing by cuobjdump."""
    found = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    jumps = [(address, _BRANCH.search(text)) for address, text in found]
    loops = [(int(to[1], 16), address) for address, to in jumps if to and int(to[1], 16) < address]
    if not loops:
        raise ValueError("sass: expected a loop, found no branch backwards")
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return sum(first <= address <= last for address, _ in found)


def length(sass: str) -> int:
    """Instructions of a listing by cuobjdump, without the padding behind the last."""
    found = [text for _, text in _INSTRUCTION.findall(sass)]
    return next(i for i in range(len(found), 0, -1) if not found[i - 1].startswith(("NOP", "BRA")))


def count(sweep: str, classes: int, gradient: str) -> Count:
    """Of a fused sweep, `forward` or `backward`, with bfloat16 logits, `digamma`, `softplus` and a prior of 1."""
    from sure_kernels.ops.evidential import kernel

    of = {"forward": kernel.sums_kernel, "backward": kernel.gradient_kernel}[sweep]
    return _count(of, kernel.compile_cases(), _FLAGS | {"K": classes, "gradient": gradient}, loop_length)


def count_measures(sweep: str, classes: int, measures: tuple[str, ...]) -> Count:
    """Of `dirichlet_uncertainty`, `forward` or `backward`, with bfloat16 logits, `softplus` and a prior of 1."""
    from sure_kernels.ops.dirichlet import kernel

    of = {"forward": kernel.forward_kernel, "backward": kernel.backward_kernel}[sweep]
    flags = _FLAGS | {"K": classes, "layout": "channels first"} | {m: m in measures for m in kernel.MEASURES}
    return _count(of, kernel.compile_cases(), flags, length)


def _count(of: Any, cases: list[Any], flags: dict[str, Any], counted: Callable[[str], int]) -> Count:
    import triton
    from triton.compiler import ASTSource

    from sure_kernels.compile_check.offline import TARGETS, compilation, nvidia_usage

    arguments = next(case for case in cases if case.kernel is of).arguments(flags)
    what = compilation(of, arguments, "sm_90", integers="16 i32")
    source = ASTSource(what.kernel, what.signature, what.constants, what.attributes)
    binary = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": what.num_warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        sass = subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True).stdout
    voxels = arguments.constants["BLOCK"] / (32 * what.num_warps)
    return Count(counted(sass) / voxels, nvidia_usage(binary.asm["cubin"])[0])


def table(classes: tuple[int, ...]) -> str:
    """Lines of a Markdown table: instructions a voxel and registers a thread, forward and backward."""
    lines = ["| classes | | forward | backward | together |", "|--:|---|--:|--:|--:|"]
    for k in classes:
        rows = {title: [count(sweep, k, g) for sweep in ("forward", "backward")] for g, title in GRADIENTS.items()}
        for measures in MEASURED:
            rows[", ".join(measures)] = [count_measures(sweep, k, measures) for sweep in ("forward", "backward")]
        for title, (forward, backward) in rows.items():
            cells = [f"{c.instructions:.0f}, {c.registers}" for c in (forward, backward)]
            together = forward.instructions + backward.instructions
            lines.append(f"| {k} | {title} | {cells[0]} | {cells[1]} | {together:.0f} |")
    return "\n".join(lines)
