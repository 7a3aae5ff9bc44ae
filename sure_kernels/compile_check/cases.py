"""What a kernel can be called with, and selections of it that meet every pair or triple of flags."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Flags = dict[str, Any]

# The launcher compiles a kernel anew for what it sees of its run-time arguments; these flags say what. Of integers:
# whether they fit 32 bits, are 1 (those become constants) or multiples of 16. Of pointers: whether they are aligned to
# 16 bytes; for AMD also whether the storage is `small`, below 2 GiB, which is addressed by 32-bit offsets in bytes.
INTEGERS = ("i32", "16 i32", "1", "i64", "16 i64")
POINTERS = ("aligned", "unaligned")
AMD_POINTERS = ("aligned small", "unaligned small", *POINTERS)


@dataclass(frozen=True)
class Arguments:
    """A kernel's arguments as the compiler needs them.

    Attributes:
        types: type of every run-time argument ("*fp32", "*bf16", "*i64", "i32", "fp32", ...), by name; "int" for an
            integer of 32 bits where it fits and else of 64. An argument that is a tuple has a tuple of types.
        constants: value of every tl.constexpr argument, and of integers that are always 1.
        num_warps: for warps of 32 lanes; targets with wider ones get as many threads.
    """

    types: Mapping[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    num_warps: int = 4


@dataclass(frozen=True)
class KernelCases:
    """One kernel in one direction, and the flags that dispatch can reach it with.

    Attributes:
        kernel: the jitted function.
        op: public name of the op.
        direction: `forward` or `backward`.
        flags: the values of each flag. A flag `K` is the number of classes: all that this kernel serves, of which the
            check takes its own choice. The check adds `integers` and `pointers` (see INTEGERS).
        arguments: (flags) -> Arguments.
        reachable: whether dispatch can reach this combination. Rows not yet complete are tried as well, so as to give
            up early: a KeyError for a flag not chosen yet counts as reachable.
        fewest_classes: of a kernel that loops over its classes at run time, the least number it is used for.
    """

    kernel: Any
    op: str
    direction: str
    flags: dict[str, tuple[Any, ...]]
    arguments: Callable[[Flags], Arguments]
    reachable: Callable[[Flags], bool] = lambda flags: True
    fewest_classes: int = 0

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def launch_flags(self, amd: bool) -> dict[str, tuple[str, ...]]:
        """`pointers`, and `integers` where the kernel has any that the launcher looks at."""
        flags = self.flags | {"integers": INTEGERS}
        rows = (dict(zip(flags, values, strict=True)) for values in itertools.product(*flags.values()))
        arguments = self.arguments(next(row for row in rows if self.reachable(row)))
        kinds = {p: arguments.types[p.name] for p in self.kernel.params if p.name not in arguments.constants}
        looked_at = any(kind == "int" or (kind == "i32" and not p.do_not_specialize) for p, kind in kinds.items())
        return {"pointers": AMD_POINTERS if amd else POINTERS} | ({"integers": INTEGERS} if looked_at else {})


def pointer_type(dtype: str) -> str:
    """The pointer type for a name as in `float32`."""
    return "*" + {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def covering_rows(
    flags: dict[str, tuple[Any, ...]], reachable: Callable[[Flags], bool], strength: int = 2
) -> list[Flags]:
    """Rows in which every reachable combination of `strength` flags occurs at least once.

    Greedy and deterministic: of the reachable rows, always the one with the most combinations not seen yet, searched
    among rows that contain the first combination missing.
    """
    asked = _asked(flags, reachable)
    # Flags that `reachable` asks for are chosen first, so that a dead end is met before much is tried.
    names = sorted(flags, key=lambda name: (name not in asked, name))
    if len(names) <= strength:
        rows = (dict(zip(names, values, strict=True)) for values in itertools.product(*(flags[n] for n in names)))
        return [row for row in rows if reachable(row)]
    missing: dict[tuple[tuple[str, int], ...], None] = {}
    for group in itertools.combinations(names, strength):
        for chosen in itertools.product(*(range(len(flags[n])) for n in group)):
            missing[tuple(zip(group, chosen, strict=True))] = None
    chosen_rows: list[Flags] = []
    while missing:
        seed = dict(next(iter(missing)))
        indices = _grow(seed, flags, names, missing, reachable, strength)
        if indices is None:
            del missing[next(iter(missing))]  # no reachable row has this combination
            continue
        for group in itertools.combinations(names, strength):
            missing.pop(tuple((n, indices[n]) for n in group), None)
        chosen_rows.append({n: flags[n][indices[n]] for n in flags})
    return chosen_rows


class _Recorder(dict[str, Any]):
    """A row that notes the flags it is asked for."""

    def __init__(self, row: Flags) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def _asked(flags: dict[str, tuple[Any, ...]], reachable: Callable[[Flags], bool]) -> set[str]:
    """The flags that `reachable` looks at, from a sample of rows."""
    draw = random.Random(0)
    asked: set[str] = set()
    for _ in range(200):
        row = _Recorder({name: draw.choice(values) for name, values in flags.items()})
        reachable(row)
        asked |= row.asked
    return asked


def _grow(
    seed: dict[str, int],
    flags: dict[str, tuple[Any, ...]],
    names: list[str],
    missing: dict[tuple[tuple[str, int], ...], None],
    reachable: Callable[[Flags], bool],
    strength: int,
) -> dict[str, int] | None:
    """`seed` completed flag by flag, best values first, backtracking where no reachable row follows."""
    with contextlib.suppress(KeyError):
        if not reachable({n: flags[n][i] for n, i in seed.items()}):
            return None
    free = [n for n in names if n not in seed]
    if not free:
        return seed
    name = free[0]

    def gain(value: int) -> int:
        chosen = {**seed, name: value}
        others = [n for n in names if n in chosen and n != name]
        groups = itertools.combinations(others, strength - 1)
        return sum(tuple((n, chosen[n]) for n in sorted((*g, name), key=names.index)) in missing for g in groups)

    for value in sorted(range(len(flags[name])), key=lambda v: (-gain(v), v)):
        found = _grow({**seed, name: value}, flags, names, missing, reachable, strength)
        if found is not None:
            return found
    return None
