"""Writing that a crash cannot tear: a file or a folder appears whole, or what was there before stays."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sure.errors import UserError


def resolved(path: Path) -> Path:
    """`path` absolute and without links. Raises UserError for links that lead round in a circle."""
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # RuntimeError is Python 3.11's and 3.12's
        raise UserError(f"{path}: expected a path, found a loop of symbolic links") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError, or ValueError for anything that is not JSON."""
    if path.exists() and not path.is_file():  # /dev/zero never ends, a pipe never begins
        raise ValueError("expected a file, found a folder or a device")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the name when the block ends well, and goes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block succeeds, and goes when it fails."""
    out = resolved(out)  # a link's target is replaced, not the link
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if out.exists():
            earlier = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            os.replace(out, earlier)  # onto an empty folder
            try:
                os.replace(folder, out)
            except BaseException:  # Ctrl-C too
                os.replace(earlier, out)
                raise
            shutil.rmtree(earlier)
        else:
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
