"""Outcomes kept in a file from run to run, one JSON object a line, so that a run compiles only what has changed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from sure_kernels.compile_check.offline import Outcome


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes by `Compilation.key`; a line that a kill cut short is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        key, narrow = row.pop("key"), tuple(row.pop("narrow"))
        found[key] = Outcome(**row, narrow=narrow)
    return found


def append(path: Path, key: str, outcome: Outcome) -> None:
    """Add one outcome in a single write, on a line of its own whether or not the last one was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, **dataclasses.asdict(outcome)})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"\n{line}".encode())
    finally:
        os.close(descriptor)
