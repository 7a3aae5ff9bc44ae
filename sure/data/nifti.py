"""NIfTI in and out: reading that trusts no header, writing that leaves a whole file or none."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import ArrayLike, DTypeLike, NDArray

from sure.errors import UserError
from sure.files import atomic

SUFFIXES = (".nii", ".nii.gz")
MAX_BYTES = 2**36
"""Largest volume that is read; a header that claims more is taken for damage."""

_DEFLATE_RATIO = 1032  # the most that one byte of a gzip stream can expand to
_CHUNK = 1 << 20
_HEADER = 540  # bytes of a NIfTI-2 header; NIfTI-1 has 348


class UnreadableError(UserError):
    """A file that is no whole NIfTI volume. `problem` says why, without the file's name."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.problem = problem


def is_nifti(path: Path) -> bool:
    """Whether the name says NIfTI; hidden files (the `._` companions that macOS leaves) do not count."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64], nib.Nifti1Header]:
    """Read a whole volume and verify it: `(array, affine 4x4, header)`.

    The array has the stored dtype, or float64 where the header scales it. No more memory is taken than the
    file really fills, whatever its header claims. Raises UnreadableError.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size == 0:
            raise UnreadableError(path, "empty file" if path.is_file() else "not a file")
        with _open(path) as file:
            start = file.read(_HEADER)
            kind = next((k for k in (nib.Nifti1Image, nib.Nifti2Image) if _starts(start, k)), None)
            if kind is None:
                raise UnreadableError(path, "not a NIfTI file")
            needed = _needed_bytes(path, start, kind, size)
            raw = _read_bytes(file, start, needed)
        if len(raw) < needed:
            raise UnreadableError(path, f"truncated: {len(raw)} of {needed} bytes")
        image = kind.from_bytes(raw)
        return np.asanyarray(image.dataobj), np.asarray(image.affine), image.header
    except UnreadableError:
        raise
    except FileNotFoundError as error:
        raise UnreadableError(path, "file not found") from error
    except (EOFError, zlib.error) as error:
        raise UnreadableError(path, f"truncated or damaged gzip file ({_one_line(error)})") from error
    except gzip.BadGzipFile as error:
        raise UnreadableError(path, f"bad gzip file ({_one_line(error)})") from error
    except Exception as error:  # nibabel and NumPy raise many kinds on a damaged header
        raise UnreadableError(path, f"cannot be read as NIfTI ({_one_line(error)})") from error


def map_nifti(path: Path) -> tuple[NDArray[Any], float, float] | None:
    """An uncompressed volume as a memory map of the numbers stored, with the slope and intercept that scale them.

    None where there is nothing to map: a compressed file, or numbers that torch has no type for. The file must be one
    that `read_nifti` reads.
    """
    if path.name.endswith(".gz"):
        return None
    proxy = cast(nib.Nifti1Image, nib.load(path, mmap="c")).dataobj
    stored = proxy.get_unscaled()  # type: ignore[attr-defined]  # an ArrayProxy
    # Copy on write, as torch warns about maps that cannot be written to; nobody does.
    if not isinstance(stored, np.memmap) or not stored.dtype.isnative or stored.dtype.kind not in "biuf":
        return None
    return stored, float(proxy.slope), float(proxy.inter)  # type: ignore[attr-defined]


def scaled(stored: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    """What `read_nifti` makes of the numbers stored."""
    return stored if (slope, inter) == (1.0, 0.0) else apply_read_scaling(stored, slope, inter)


def save_nifti(
    array: ArrayLike,
    like: Path | nib.Nifti1Header | ArrayLike,
    path: Path,
    dtype: DTypeLike,
    *,
    scale: float | None = None,
) -> None:
    """Write `array` `(*spatial)` on the grid of `like`, atomically.

    Args:
        array: 2D or 3D values. For an integer `dtype` they must be whole numbers in its range.
        like: NIfTI file or header whose affine, qform, sform (with their codes), spacing and units are kept,
            or a 4x4 affine in mm.
        path: target, `.nii` or `.nii.gz`; its folder must exist.
        dtype: stored type.
        scale: for an integer `dtype`: values are stored as the nearest multiple of it, which readers restore from
            scl_slope, so that they are off by half of it at most. By default nothing is scaled.

    Raises ValueError where shapes or values do not fit, UnreadableError for a bad reference file.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"path: expected a name ending in .nii or .nii.gz, got {path.name}")
    values, dtype = np.asarray(array), np.dtype(dtype)
    if scale is not None:
        scale = float(np.float32(scale))  # as the header holds it
        values = np.rint(values.astype(np.float64) / scale)
    with np.errstate(invalid="ignore"):
        stored = values.astype(dtype, copy=False)
    if dtype.kind in "iu" and not np.array_equal(stored, values):
        what = "whole numbers that fit" if scale is None else f"numbers whose multiples of {scale:g} fit"
        raise ValueError(f"array: expected {what} {dtype}")
    header = _reference_header(like, values.shape)
    if header.get_data_shape() == (*values.shape, 1):
        stored = stored[..., None]
    elif header.get_data_shape()[: values.ndim] != values.shape:
        raise ValueError(f"array: expected shape {header.get_data_shape()} of `like`, got {values.shape}")
    best = header.get_best_affine()
    header.set_data_shape(stored.shape)
    header.set_data_dtype(dtype)
    header.set_slope_inter(None, None)
    header.extensions.clear()
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"SURE Kernels"
    header.set_intent("none")
    # The same best affine as in the header: nibabel then leaves qform and sform as they are.
    image = (nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image)(stored, best, header)
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    with atomic(path) as temporary, temporary.open("wb") as file:
        if path.name.endswith(".gz"):
            # No time stamp and no file name inside: the same values give the same bytes.
            with gzip.GzipFile("", "wb", 4, file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def spacing_of(affine: NDArray[Any], ndim: int) -> tuple[float, ...]:
    """Voxel size in mm along each of the first `ndim` array axes."""
    return tuple(float(s) for s in np.linalg.norm(affine[:3, :ndim], axis=0))


def _reference_header(like: Path | nib.Nifti1Header | ArrayLike, shape: tuple[int, ...]) -> nib.Nifti1Header:
    if isinstance(like, nib.Nifti1Header):
        return like.copy()
    if isinstance(like, (str, os.PathLike)):
        try:
            return cast(nib.Nifti1Header, nib.load(like).header.copy())
        except Exception as error:
            raise UnreadableError(Path(like), f"cannot be read as NIfTI ({_one_line(error)})") from error
    affine = np.asarray(like, dtype=np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"like: expected a file, a header or a 4x4 affine, got shape {affine.shape}")
    header = nib.Nifti1Image(np.empty(shape, np.uint8), affine).header
    header.set_xyzt_units("mm")
    return header


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.name.endswith(".gz") else path.open("rb"))


def _starts(start: bytes, kind: type[nib.Nifti1Image]) -> bool:
    return bool(kind.header_class.may_contain_header(start))


def _needed_bytes(path: Path, start: bytes, kind: type[nib.Nifti1Image], size: int) -> int:
    """Bytes that the uncompressed file must have; raises before anything of that size is allocated."""
    header = kind.header_class(start[: kind.header_class.template_dtype.itemsize])
    shape = tuple(int(n) for n in header.get_data_shape())
    if not shape or min(shape) < 1:
        raise UnreadableError(path, f"has no voxels (shape {shape})")
    needed = int(header["vox_offset"]) + math.prod(shape) * header.get_data_dtype().itemsize
    holds = size * _DEFLATE_RATIO if path.name.endswith(".gz") else size
    if needed > min(holds, MAX_BYTES):
        raise UnreadableError(path, f"truncated: header claims shape {shape}, the file has {size} bytes")
    return needed


def _read_bytes(file: BinaryIO, start: bytes, needed: int) -> bytes:
    """The first `needed` bytes; `file`, of which `start` was read, goes to its end, where gzip's checksum lies."""
    kept = io.BytesIO()  # whose value is handed on without a copy
    kept.write(start[:needed])
    while chunk := file.read(_CHUNK):
        kept.write(chunk[: needed - kept.tell()])
    return kept.getvalue()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
