"""Find address arithmetic that would overflow past 2^31 elements, in Triton's intermediate code.

Offsets must be widened before they are multiplied: `i * stride` overflows 32 bits although i and the stride fit. So
from every pointer addition the offset, and from every load and store the mask, is followed back through arithmetic,
reshapes, loops and branches. A 32-bit product or left shift met there is a finding, unless it is made of constants,
lanes of a block and counters of loops with constant bounds alone. What comes out of a division, remainder, minimum
or maximum is taken to be bounded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_ASSIGNMENT = re.compile(r"^(%[\w-]+)(?::(\d+))? = \"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_FOR = re.compile(r"scf\.for (%[\w-]+) = (%[\w#-]+) to (%[\w#-]+) step (%[\w#-]+)")
_BINDING = re.compile(r"(%[\w-]+) = (%[\w#-]+)")
_ARGUMENT = re.compile(r"(%[\w-]+): ")
_NARROW = re.compile(r": (tensor<[\dx]+x)?i32\b")

_PRODUCTS = {"arith.muli", "arith.shli"}
_SUMS = {
    "arith.addi", "arith.subi", "arith.extsi", "arith.extui", "arith.trunci", "arith.select", "carried", "counter",
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "ttg.convert_layout",
} | _PRODUCTS  # fmt: skip
_BOUNDED = {
    "arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.minsi", "arith.minui", "arith.maxsi",
    "arith.maxui", "arith.shrsi", "arith.shrui", "arith.andi", "arith.ori", "arith.xori", "arith.cmpi", "math.absi",
}  # fmt: skip
_UNBOUNDED = {"tt.get_program_id", "tt.get_num_programs", "tt.load", "argument"}


class _Region:
    """An open region: the names in it, what its `yield` gives values to, and of a `while` what its `condition` does."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.yields: list[list[str]] = []
        self.conditions: list[list[str]] = []


class _Code:
    """What every value of a kernel is made of. Regions beside each other may share a name, so each gets a number."""

    def __init__(self, ttir: str) -> None:
        self.operation: dict[str, str] = {}
        self.operands: dict[str, list[str]] = {}
        self.text: dict[str, str] = {}
        self.seeds: list[str] = []
        self.regions = [_Region()]
        for raw in ttir.splitlines():
            line = raw.split(" loc(")[0].strip()
            if line.startswith(("tt.func", "^")):
                self._arguments(raw, inside=line.startswith("^"))
            elif line.startswith("scf.yield"):
                self._give(self.regions[-1].yields, self._values(line))
            elif line.startswith("scf.condition"):
                self._give(self.regions[-1].conditions, self._values(line)[1:])
            elif line.startswith("tt.store"):
                self.seeds += self._values(line)[2:]
            elif line.startswith("}"):
                closed = self.regions.pop()
                if line.endswith("{"):  # else, or the second half of a while
                    closed.names = {}
                    self.regions.append(closed)
            else:
                self._statement(line)

    def _values(self, text: str) -> list[str]:
        found = []
        for name in _VALUE.findall(text):
            scopes = (region.names[name] for region in reversed(self.regions) if name in region.names)
            found.append(next(scopes, name))
        return found

    def _define(self, name: str, operation: str, operands: list[str], region: _Region) -> str:
        unique = f"{name} {len(self.operation)}"
        region.names[name] = unique
        self.operation[unique], self.operands[unique] = operation, operands
        return unique

    def _give(self, targets: list[list[str]], values: list[str]) -> None:
        for names, value in zip(targets, values, strict=bool(targets)):
            for name in names:
                self.operands[name].append(value)

    def _arguments(self, line: str, inside: bool) -> None:
        """Of the kernel; or of a region, which only the second half of a `while` gets from what is followed here."""
        names = _ARGUMENT.findall(line)
        region = self.regions[-1]
        if not inside:
            region = _Region()
            self.regions.append(region)
        conditions = region.conditions or [[] for _ in names]
        for name, targets in zip(names, conditions, strict=True):
            unique = self._define(name, "carried" if inside else "argument", [], region)
            if targets:
                # Given with the result of the loop.
                self.operands[unique] = self.operands[targets[0]]

    def _statement(self, line: str) -> None:
        match, loop = _ASSIGNMENT.match(line), _FOR.search(line)
        outer, inner = self.regions[-1], _Region()
        if loop:
            self._define(loop.group(1), "counter", self._values(" ".join(loop.groups()[1:])), inner)
        if match is not None:
            name, number, kind, rest = match.groups()
            names = [name] if number is None else [f"{name}#{i}" for i in range(int(number))]
            if kind in ("scf.for", "scf.if", "scf.while"):
                self._carry(kind, names, rest, outer, inner)
            else:
                operands = self._values(rest)
                for name in names:
                    self.text[self._define(name, kind, operands, outer)] = line
                if kind in ("tt.addptr", "tt.load"):
                    self.seeds += operands[1:2]
        if line.endswith("{"):
            self.regions.append(inner)

    def _carry(self, kind: str, names: list[str], rest: str, outer: _Region, inner: _Region) -> None:
        """Results of a loop or branch, and what a loop carries from turn to turn."""
        bindings = [] if kind == "scf.if" else _BINDING.findall(rest.split("->")[0].split("iter_args")[-1])
        starts = [self._values(start) for _, start in bindings]
        results = [self._define(name, "carried", [], outer) for name in names]
        carried = [
            self._define(name, "carried", start, inner) for (name, _), start in zip(bindings, starts, strict=True)
        ]
        if kind == "scf.while":
            inner.yields, inner.conditions = [[name] for name in carried], [[name] for name in results]
        elif kind == "scf.if":
            inner.yields = [[name] for name in results]
        else:
            for result, start in zip(results, starts, strict=True):
                self.operands[result] += start
            inner.yields = [list(pair) for pair in zip(carried, results, strict=True)]

    def cone(self, start: str, followed: Collection[str]) -> Iterator[str]:
        """`start` and what it is made of, as far as operations are among `followed`."""
        seen, stack = set(), [start]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            if self.operation.get(name) in followed:
                stack += self.operands.get(name, [])


def narrow_products(ttir: str) -> list[str]:
    """The lines of 32-bit products that reach an address or a mask: empty where addressing is 64-bit throughout."""
    code = _Code(ttir)
    found: dict[str, None] = {}
    for seed in code.seeds:
        for name in code.cone(seed, _SUMS | _BOUNDED):
            if code.operation.get(name) not in _PRODUCTS or not _NARROW.search(code.text[name]):
                continue
            if any(code.operation.get(other) in _UNBOUNDED for other in code.cone(name, _SUMS)):
                found[code.text[name]] = None
    return sorted(found)
