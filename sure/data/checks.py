"""Read every file of a data set before anything is trained on it, and say in one table all that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sure.data.layouts import MISSING_LABEL, Case, Dataset, Fault
from sure.data.nifti import UnreadableError, read_nifti, spacing_of
from sure.errors import UserError

AFFINE_TOLERANCE = 1e-3
"""Largest entry by which two affines may differ, in voxels: of inv(A) B - I."""

SPACING_TOLERANCE = 0.01
"""Share by which spacings of different cases may differ and still count as one."""


@dataclass
class _Seen:
    """What one case holds, as far as it could be read."""

    channels: int | None = None
    ndim: int | None = None
    classes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def check_dataset(
    dataset: Dataset,
    *,
    num_classes: int | None = None,
    labelled: bool = True,
    spatial_dims: int | None = None,
    progress: bool = False,
) -> tuple[int, list[Fault]]:
    """Read every file completely and list everything that training could trip over.

    Args:
        dataset: what `discover` found; its `problems` are part of the result.
        num_classes: number of classes K, background included. By default as many as the layout declares, else
            as many as the labels hold, counted up to the first value that no file has.
        labelled: whether a case without a label is a fault.
        spatial_dims: of the network; for 3 a 2D image is a fault.
        progress: show a progress bar on stderr.

    Returns `(K, faults)`, the faults sorted by case. Raises UserError where the labels hold no class 1: there is
    nothing to learn.
    """
    faults, seen = list(dataset.problems), {}
    for case in tqdm(dataset.cases, desc="checking", unit="case", disable=not progress):
        found = _Seen()
        faults += _check_case(case, dataset, found, labelled)
        seen[case] = found
    faults += _check_agreement(dataset, seen, spatial_dims)

    if num_classes is None:
        ignored = () if dataset.ignore_label is None else (dataset.ignore_label,)
        values = {int(v) for s in seen.values() for v in s.classes} - set(ignored)
        num_classes = len(dataset.class_names) if dataset.class_names else _first_missing(values)
    if num_classes < 2 and any(s.classes.size for s in seen.values()):
        message = f"{dataset.root}: expected labels of at least 2 classes, 0, 1 and so on without gaps, found "
        message += _found_labels(seen)
        raise UserError("\n".join([message, format_faults(faults)] if faults else [message]))
    for case, found in seen.items():
        faults += _check_range(case, found.classes, num_classes, dataset)
    return num_classes, sorted(faults, key=lambda f: (f.case, str(f.file), f.problem))


def spacings_differ(dataset: Dataset) -> str:
    """How far voxels differ in size from case to case, from headers alone; empty where they do not, to a hundredth."""
    images = [cast(nib.Nifti1Image, nib.load(case.images[0])) for case in dataset.cases]
    axes = min(len(image.shape) for image in images)  # two of flat images
    steps = np.array([spacing_of(np.asarray(image.affine), min(axes, 3)) for image in images])
    low, high = steps.min(0), steps.max(0)
    if not np.any(high > low * (1 + SPACING_TOLERANCE)):
        return ""
    shown = (" x ".join(f"{step:.3g}" for step in corner) for corner in (low, high))
    return f"voxels differ in size from case to case, from {' to '.join(shown)} mm"


def format_faults(faults: Collection[Fault]) -> str:
    """One aligned text table: case, problem, file; a row for each fault."""
    rows = [("case", "problem", "file"), *((f.case, f.problem, str(f.file)) for f in faults)]
    case, problem = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{case}}  {b:<{problem}}  {c}" for a, b, c in rows)


def _check_case(case: Case, dataset: Dataset, seen: _Seen, labelled: bool) -> Iterator[Fault]:
    grid: tuple[tuple[int, ...], NDArray[np.float64]] | None = None
    declared = dataset.channels if len(case.images) == 1 else None
    for path in case.images:
        try:
            array, affine, _ = read_nifti(path)
        except UnreadableError as error:
            yield Fault(case.name, path, error.problem)
            continue
        # One 4D file may hold the channels, if dataset.json says that there are so many.
        allowed = (1, declared or 1)
        if array.ndim not in (2, 3) and not (array.ndim == 4 and array.shape[3] in allowed):
            yield Fault(case.name, path, f"expected a 3D image, found shape {array.shape}")
            continue
        shape = array.shape[:3]
        seen.channels = (seen.channels or 0) + (array.shape[3] if array.ndim == 4 else 1)
        seen.ndim = len(shape)
        yield from (Fault(case.name, path, p) for p in (*_value_problems(array), *_affine_problems(affine)))
        if grid is None:
            grid = shape, affine
        else:
            yield from (Fault(case.name, path, p) for p in _grid_problems(grid, shape, affine, "first channel"))
    if seen.channels is not None and len(case.images) > 1 and seen.channels < len(case.images):
        seen.channels = None  # an unreadable channel has its fault already
    if case.label is None:
        if labelled:
            yield Fault(case.name, case.images[0], MISSING_LABEL)
        return
    try:
        array, affine, _ = read_nifti(case.label)
    except UnreadableError as error:
        yield Fault(case.name, case.label, error.problem)
        return
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    problems = [*_value_problems(array), *_affine_problems(affine)]
    if grid is not None:
        problems += _grid_problems(grid, array.shape, affine, "image")
    elif array.ndim not in (2, 3):
        problems.append(f"expected a 3D label map, found shape {array.shape}")
    if array.dtype.kind == "f" and not problems and np.any(array != np.rint(array)):
        example = array[array != np.rint(array)][0]
        problems.append(f"float labels: expected whole numbers, found {example:g}")
    yield from (Fault(case.name, case.label, p) for p in problems)
    if not problems:
        # Clipped: what no integer holds is out of range all the same.
        seen.classes = np.clip(np.unique(array).astype(np.float64), -1e9, 1e9).astype(np.int64)


def _value_problems(array: NDArray[Any]) -> Iterator[str]:
    if array.dtype.kind not in "biuf":
        kind = "complex" if array.dtype.kind == "c" else "coloured or structured"
        yield f"expected real numbers, found {kind} voxels ({array.dtype})"
    elif array.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            bad = array.size - np.count_nonzero(np.isfinite(array.astype(np.float32)))
        if bad:
            yield f"{bad} voxels are NaN, infinite or too large for float32"


def _affine_problems(affine: NDArray[np.float64]) -> Iterator[str]:
    if not np.isfinite(affine).all():
        yield "affine holds NaN or infinity"
    elif abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        yield "affine is singular"


def _grid_problems(
    grid: tuple[tuple[int, ...], NDArray[np.float64]],
    shape: tuple[int, ...],
    affine: NDArray[np.float64],
    other: str,
) -> Iterator[str]:
    if shape != grid[0]:
        yield f"grid differs from the {other}: shape {shape} against {grid[0]}"
        return
    if any(_affine_problems(grid[1])) or any(_affine_problems(affine)):
        return
    difference = np.abs(np.linalg.solve(grid[1], affine) - np.eye(4)).max()
    if difference > AFFINE_TOLERANCE:
        yield f"affine differs from the {other}'s by {difference:.3g} voxels"


def _found_labels(seen: dict[Case, _Seen]) -> str:
    """The labels of all cases in a few words, with a file that holds the largest."""
    largest = max((case for case, s in seen.items() if s.classes.size), key=lambda case: seen[case].classes[-1])
    values = sorted({int(v) for s in seen.values() for v in s.classes})
    shown = _listed(values)
    return f"{shown} ({values[-1]} in {largest.label})" if len(values) > 1 else f"{shown} alone"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _check_agreement(dataset: Dataset, seen: dict[Case, _Seen], spatial_dims: int | None) -> Iterator[Fault]:
    """Faults of cases that are sound alone, but unlike the rest: channels, 2D among 3D."""
    counts = Counter(s.channels for s in seen.values() if s.channels is not None)
    channels = dataset.channels or (counts.most_common(1)[0][0] if counts else None)
    volumes = any(s.ndim == 3 for s in seen.values())
    for case, s in seen.items():
        if s.channels is not None and s.channels != channels:
            yield Fault(case.name, case.images[0], f"expected {channels} image channels, found {s.channels}")
        if s.ndim == 2 and spatial_dims == 3:
            yield Fault(case.name, case.images[0], "expected a 3D image for a 3D run, found a 2D image")
        elif s.ndim == 2 and volumes:
            yield Fault(case.name, case.images[0], "2D image among 3D images")


def _check_range(case: Case, values: NDArray[np.int64], num_classes: int, dataset: Dataset) -> Iterator[Fault]:
    outside = [int(v) for v in values if not 0 <= v < num_classes and v != dataset.ignore_label]
    if outside and case.label is not None:
        shown = _listed(outside)
        expected = f"expected 0 to {num_classes - 1}"
        if not dataset.class_names:
            expected += " without gaps"
        yield Fault(case.name, case.label, f"labels out of range: {expected}, found {shown}")


def _first_missing(values: Iterable[int]) -> int:
    present, k = set(values), 0
    while k in present:
        k += 1
    return k
