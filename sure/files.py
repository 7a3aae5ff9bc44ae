"""Writing that a crash cannot tear: a file or a folder appears whole, or what was there before stays."""

from __future__ import annotations

import ctypes
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


def check_writable(path: Path) -> None:
    """UserError where a file or folder `path` could not be written; asked before long work, leaving no trace."""
    whole = resolved(path)
    if whole.exists() and not whole.is_file() and not whole.is_dir():
        raise UserError(f"{path}: expected a file or a folder, found a device")
    for place in (whole, whole.parent):
        while not place.exists():
            place = place.parent
        if place.is_file() and place != whole:
            raise UserError(f"{path}: cannot be written, {place} is a file")
        try:
            if place.is_dir():
                tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the name when the block ends well, and goes otherwise.

    Raises UserError where `path` is neither a file nor free: a device would be replaced too.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file, found a folder or a device")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _naming(path, temporary, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all; its folder is made if missing.

    Of file names that are no UTF-8 the odd bytes are written as escapes, which JSON reads back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block succeeds, and goes when it fails."""
    check_writable(out)
    out = resolved(out)  # a link's target is replaced, not the link
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if not out.exists():
            os.replace(folder, out)
        elif not _exchanged(folder, out):
            earlier = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            os.replace(out, earlier)  # onto an empty folder
            try:
                os.replace(folder, out)
            except BaseException:  # Ctrl-C too
                os.replace(earlier, out)
                raise
            shutil.rmtree(earlier)
    except OSError as error:
        raise _naming(out, folder, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _naming(path: Path, temporary: Path, error: OSError) -> OSError:
    """`error` of `path` where it names nothing, as of a full disk, or what stands in for it."""
    if error.filename is None or str(error.filename).startswith(str(temporary)):
        return OSError(error.errno, error.strerror or str(error), str(path))
    return error


def _exchanged(first: Path, second: Path) -> bool:
    """Swap two names in one step, where the system can: Python has no call for Linux's renameat2."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap is not None and swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
