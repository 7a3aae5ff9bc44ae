"""Find address arithmetic that would overflow past 2^31 elements, in Triton's intermediate code.

Offsets must be widened before they are multiplied: `i * stride` overflows 32 bits although i and the stride fit. So
from every pointer addition the offset is followed back through additions, products, extensions and reshapes; a
32-bit product met there is a finding, unless it is made of constants, lanes of a block and counters of loops with
constant bounds alone. Results of divisions, remainders, minima and maxima are taken to be bounded.
"""

from __future__ import annotations

import re

_ASSIGNMENT = re.compile(r"^\s*(%[\w-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w-]+")
_FOR = re.compile(r"scf\.for (%[\w-]+) = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)(?:.*iter_args\((.*?)\))?")
_BINDING = re.compile(r"(%[\w-]+) = (%[\w-]+)")
_ARGUMENT = re.compile(r"(%[\w-]+): ")

_FOLLOWED = {
    "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.extui", "arith.trunci", "arith.select",
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "ttg.convert_layout",
}  # fmt: skip
_NARROW = re.compile(r": (tensor<[\dx]+x)?i32\b")


def narrow_products(ttir: str) -> list[str]:
    """The lines of 32-bit products that reach an address: empty where addressing is 64-bit throughout."""
    operands: dict[str, list[str]] = {}
    operation: dict[str, str] = {}
    text: dict[str, str] = {}
    offsets: list[str] = []
    unbounded = {"tt.get_program_id", "tt.get_num_programs", "argument"}
    for line in ttir.splitlines():
        if "tt.func" in line:
            operation.update((name, "argument") for name in _ARGUMENT.findall(line))
            continue
        loop = _FOR.search(line)
        if loop:
            counter, low, high, _, bindings = loop.groups()
            operation[counter], operands[counter] = "counter", [low, high]
            for name, start in _BINDING.findall(bindings or ""):
                operation[name], operands[name] = "carried", [start]
            continue
        match = _ASSIGNMENT.match(line)
        if not match:
            continue
        name, kind, rest = match.groups()
        operation[name], text[name] = kind, line.strip()
        operands[name] = _VALUE.findall(rest)
        if kind == "tt.addptr":
            offsets.append(operands[name][1])

    def cone(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if operation.get(name) in _FOLLOWED or operation.get(name) in ("counter", "carried"):
                stack += operands.get(name, [])
        return seen

    found: dict[str, None] = {}
    for offset in offsets:
        for name in cone(offset):
            if operation.get(name) != "arith.muli" or not _NARROW.search(text[name].split("loc(")[0]):
                continue
            if any(operation.get(other) in unbounded for other in cone(name)):
                found[text[name].split(" loc(")[0]] = None
    return sorted(found)
